"""`hfgen report`: what it reads of a run's folder, and the page it writes."""

import json
import math
import re

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

from hfgen.cli.report import report
from hfgen.runs import read_run, render
from hfgen.runs.page import POINTS, _thin

FINDING = {
    "kind": "overfit", "step": 450, "confidence": 0.98, "sentence": "The validation loss rises <again>.",
    "advice": "stop near step 400", "noticed": 500,
}  # fmt: skip


def write(folder, step, rows, max_steps=1000, findings=(), name="overfit_gap"):
    """A checkpoint as the Trainer writes it, with one callback's state."""
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    saved = {"name": name, "findings": list(findings)}
    state = {
        "global_step": step, "max_steps": max_steps, "log_history": rows,
        "stateful_callbacks": {"TrainerControl": {"args": {}, "attributes": {}},
                               "Any": {"args": {}, "attributes": {"_saved": saved}}},
    }  # fmt: skip
    (place / "trainer_state.json").write_text(json.dumps(state))
    return place


def rows(n, **more):
    return [{"step": s, "epoch": s / 100, "loss": math.exp(-s / 200), **more} for s in range(10, n + 1, 10)]


def test_the_newest_state_is_read_and_findings_come_surest_first(tmp_path):
    other, fine = FINDING | {"kind": "spike", "confidence": 0.7}, FINDING | {"kind": "grokked", "level": "INFO"}
    write(tmp_path, 500, rows(500))
    write(tmp_path, 1000, rows(1000), findings=[fine, other, FINDING])
    run = read_run(tmp_path)
    assert run.step == 1000 and run.finished and not run.problems and len(run.rows) == 100
    assert [f.kind for f in run.findings] == ["overfit", "spike", "grokked"] and run.findings[0].source == "overfit_gap"
    page = render([run])
    assert page.index("rises &lt;again&gt;.") < page.index("<h3>spike")
    assert (
        "since step 450, 45% of the run; noticed at step 500; how sure: 98%" in page
        and "finding fine" in page
        and "<again>" not in page
    )


def test_a_finding_in_the_callbacks_own_file_is_read_once(tmp_path):
    place = write(tmp_path, 1000, rows(1000), findings=[FINDING])
    (place / "hfgen_overfit_gap.json").write_text(json.dumps({"name": "overfit_gap", "findings": [FINDING]}))
    (place / "hfgen_soup.json").write_text(json.dumps({"name": "soup", "findings": [FINDING | {"kind": "soup"}]}))
    assert sorted(f.kind for f in read_run(tmp_path).findings) == ["overfit", "soup"]


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path):
    write(tmp_path, 500, rows(500))
    bad = tmp_path / "checkpoint-600"
    bad.mkdir()
    (bad / "trainer_state.json").write_text('{"global_step": 600, "log_hist')
    run = read_run(tmp_path)
    assert run.step == 500 and not run.finished and len(run.problems) == 1
    page = render([run])
    assert "cannot be read (JSONDecodeError" in page and "did not finish, as far as its files say, at step 500" in page


def test_an_empty_folder_is_said_and_no_folder_is_an_error(tmp_path):
    page = render([read_run(tmp_path)])
    assert "there is no trainer_state.json" in page and "No log was found." in page and "<h2>Curves" not in page
    with pytest.raises(ValueError, match="none is not a folder; give the output_dir of a run"):
        read_run(tmp_path / "none")


def test_a_loss_that_is_no_number_is_a_finding(tmp_path):
    write(tmp_path, 300, [*rows(200), {"step": 210, "loss": float("nan")}, {"step": 220, "loss": float("nan")}])
    (found,) = read_run(tmp_path).findings
    assert (found.kind, found.step, found.confidence, found.source) == ("diverged", 210, 1.0, "log")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=2) | st.dictionaries(st.sampled_from(["name", "findings", "attributes"]), x, max_size=2)
    ),
    max_leaves=4,
)
ROW = st.dictionaries(st.sampled_from(["loss", "eval_loss", "train_runtime"]), ANY).map(lambda row: row | {"step": 3})
SAVED = ANY | st.fixed_dictionaries({"name": ANY, "findings": ANY | st.lists(ANY | st.just(FINDING))})
STATE = st.fixed_dictionaries(
    {"global_step": ANY | st.just(3), "log_history": ANY | st.lists(ROW, max_size=3)},
    optional={
        "max_steps": ANY,
        "stateful_callbacks": ANY
        | st.fixed_dictionaries({"A": ANY | SAVED.map(lambda x: {"attributes": {"_saved": x}})}),
    },
)


@settings(max_examples=150, deadline=None)
@given(STATE | ANY, SAVED)
def test_any_json_is_read_or_named(tmp_path_factory, state, own):
    place = tmp_path_factory.mktemp("run")
    (place / "trainer_state.json").write_text(json.dumps(state))
    (place / "hfgen_x.json").write_text(json.dumps(own))
    assert "<h1>" in render([read_run(place)])


def test_the_page_stands_alone_and_stays_small(tmp_path):
    for name in ("a", "b", "c"):
        more = {f"hfgen/m/{i}": 1.0 for i in range(40)}
        write(tmp_path / name, 50_000, [r | more for r in rows(50_000)], max_steps=50_000, findings=[FINDING])
    page = render([read_run(tmp_path / name) for name in ("a", "b", "c")])
    assert len(page) < 2_000_000
    assert not re.findall(r"https?:|<script|<link|@import|url\((?!#)", page)
    assert "Logged, not drawn:" in page and "Side by side" in page


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
@settings(max_examples=30, deadline=None)
def test_a_thinned_curve_keeps_its_extremes_and_its_ends(values):
    steps, kept = _thin(list(range(len(values))), values)
    assert len(kept) <= POINTS + 4 and steps == sorted(steps) and steps[0] == 0 and steps[-1] == len(values) - 1
    assert (min(kept), max(kept)) == (min(values), max(values))


def test_the_command_reads_a_real_run(tmp_path):
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 16,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape))
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 16
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=6, logging_steps=1, eval_strategy="steps", eval_steps=2, save_steps=6,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, eval_dataset=data).train()
    app = typer.Typer()
    app.command()(report)
    out = tmp_path / "sub" / "page.html"
    done = CliRunner().invoke(app, [str(tmp_path / "run"), "--out", str(out)])
    assert done.exit_code == 0 and "run: no finding" in done.output and "eval_loss" in out.read_text()
    failed = CliRunner().invoke(app, [str(tmp_path / "no")])
    assert failed.exit_code == 2


def test_what_a_finding_explains_comes_after_it(tmp_path):
    sure = FINDING | {"kind": "overfit/chat", "confidence": 1.0}
    why = FINDING | {"kind": "grokked", "level": "INFO", "confidence": 0.7, "explains": ["overfit", "grokked"]}
    write(tmp_path, 1000, rows(1000), findings=[sure, why, FINDING | {"kind": "spike", "explains": "overfit"}])
    assert [f.kind for f in read_run(tmp_path).findings] == ["spike", "grokked", "overfit/chat"]
