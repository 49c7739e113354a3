"""`hfgen report` on runs of the corpus: what its page says first is what was done to the run, at the right step."""

import json
import random
import re

import pytest

from hfgen.evidence.corpus.figures import halves, read_corpus
from hfgen.evidence.corpus.replay import replay
from hfgen.runs import read_run, render

WORDS = {
    "overfit": "overfits", "grokked": "^Grokking", "softmax collapsed": "^Softmax collapse", "loss spike": "^Loss spike",
    "rate too high": "diverges", "task switch": "^Stability gap.*earlier task", "forgets": "forgets",
}  # fmt: skip
RNG = random.Random(20261121)
CASES = sorted(RNG.sample(sorted(WORDS), 5))
_, REPORTED = halves(read_corpus())
DRAWN = {label: RNG.choice([r for r in REPORTED if r["label"] == label]) for label in CASES}


def folder_of(record, folder):
    """The record as the Trainer and the monitors leave a run: the log, and findings at today's defaults."""
    place, steps = folder / f"checkpoint-{record['config']['steps']}", record["config"]["steps"]
    place.mkdir(parents=True)
    callbacks = {
        name: {"args": {}, "attributes": {"_saved": {"name": name, "findings": found}}}
        for name, found in replay(record).items()
    }
    state = {"global_step": steps, "max_steps": steps, "log_history": record["log"], "stateful_callbacks": callbacks}
    (place / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize("label", CASES)
def test_the_first_finding_of_the_page_is_the_label(label, tmp_path):
    record = DRAWN[label]
    run = read_run(folder_of(record, tmp_path))
    page = render([run])
    kind, sentence = re.search(r"<section class='finding[^']*'><h3>(.*?)</h3><p>(.*?)</p>", page).groups()
    place = int(re.search(r"since step ([\d,]+)", page).group(1).replace(",", ""))
    assert re.search(WORDS[label], sentence), (kind, sentence)
    assert abs(place - record["step"]) <= 0.1 * record["config"]["steps"]


def test_a_healthy_run_has_no_trouble_on_its_page(tmp_path):
    record = random.Random(7).choice([r for r in REPORTED if r["label"] == "healthy"])
    assert not [f for f in read_run(folder_of(record, tmp_path)).findings if f.trouble]
