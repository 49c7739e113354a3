"""S3FT's ablations as an experiment: what each arm trains on, whose settings it has, what the verdicts follow from."""

import dataclasses

import pytest

from hfgen import sandbox
from hfgen.evidence import find_experiment
from hfgen.sandbox import tasks
from hfgen_plugins.trainers.s3ft import evidence
from hfgen_plugins.trainers.s3ft import evidence_ablations as ablations

SEED = 1000  # never reported


@pytest.fixture(scope="module")
def found():
    settings = dataclasses.replace(ablations.SETTINGS, taken=dataclasses.replace(evidence.SETTINGS, steps=2))
    return {a.id: ablations.run_arm(a.id, SEED, settings, lambda *_: None) for a in ablations.ARMS}


@pytest.mark.parametrize("task", ablations.TASKS)
def test_every_arm_trains_on_the_rows_it_says(found, task):
    shares = {arm: [r[f"{task}_{s}"] for s in ("self", "paraphrase", "gold")] for arm, r in found.items()}
    right = found["base"][f"{task}_trained"]  # what the base answers rightly is what S3FT takes from it
    assert 0 < right < 1
    assert shares == {
        "base": [0, 0, 0],
        "sft": [0, 0, 1],
        "s3ft": pytest.approx([right, 1 - right, 0]),
        "no_paraphrase": pytest.approx([right, 0, 1 - right]),
        "drop_failures": pytest.approx([right, 0, 0]),
        "string_judge": [0, 0, 1],
    }
    assert all(set(r) == {m.key for m in ablations.METRICS} for r in found.values())


def test_settings_are_those_of_the_first_claim(tmp_path):
    assert ablations.SETTINGS.taken == evidence.SETTINGS and ablations.EXPERIMENT.tries == 0
    trained, _ = tasks.D.split(SEED)
    for arm in (a.id for a in ablations.ARMS[1:]):
        made = ablations._trainer(
            arm,
            "sum",
            SEED,
            evidence.SETTINGS,
            sandbox.load_model(),
            sandbox.load_tokenizer(),
            trained,
            str(tmp_path / arm),
        )
        assert made.args.learning_rate == (1e-3 if arm == "sft" else 3e-4)
        assert (made.args.max_steps, made.args.per_device_train_batch_size) == (1000, 16)
        assert made.model.peft_config["default"].r == 8
        on = [name for name in ablations.ABLATIONS if getattr(made.args, name, False)]
        assert on == list(ablations.ABLATIONS.get(arm, ()))


def test_the_two_tasks():
    """What the notes say of them: gold and its rewriting are right on both, the base on 14 and 9 prompts of 28."""
    prompts = tasks.D.prompts
    said = sandbox.answers(sandbox.load_model(), sandbox.load_tokenizer(), prompts)
    for task, base in (("sum", 14), ("sorted", 9)):
        right = ablations.JUDGES[task]
        assert sum(map(right, prompts, said)) == base
        for prompt in prompts:
            gold = tasks.D.gold(prompt)
            assert right(prompt, gold) and right(prompt, tasks.oracle_paraphraser(prompt, gold))
    assert ablations.judge_sorted("D17=", "9+7+1") and ablations.judge_sorted("D18=", ">09.15.18:9+6+3")
    assert not any(ablations.judge_sorted("D17=", wrong) for wrong in ("7+9+1", "9+7+2", "9+8", "", "9+7+1 "))


def made(**arms):
    """Samples of 3 seeds: (trained, held out, old kept) of both tasks; arms not given are the full method's."""
    known = {"base": (0.5, 0.5, 1.0), "sft": (1.0, 0.1, 0.1), "s3ft": (1.0, 0.6, 0.8)} | arms
    keys = ("trained", "held_out", "old")
    return {
        arm.id: {
            f"{task}_{key}": [value + 0.01 * seed for seed in range(3)]
            for task in ablations.TASKS
            for key, value in zip(keys, known.get(arm.id, known["s3ft"]), strict=True)
        }
        for arm in ablations.ARMS
    }


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (
            made(),
            ["reproduced", "partly", "partly", "partly"],
        ),  # as good without a part: it costs nothing, but is no gain
        (
            made(no_paraphrase=(0.9, 0.4, 0.6), drop_failures=(0.9, 0.56, 0.9), string_judge=(0.9, 0.55, 0.85)),
            ["reproduced", "reproduced", "not reproduced", "reproduced"],
        ),
        (made(s3ft=(0.94, 0.04, 0.5)), ["not reproduced", "partly", "partly", "partly"]),
        (
            made(s3ft=(1.0, 0.6, 0.5)),
            ["partly", "partly", "partly", "partly"],
        ),  # loses more than half of what SFT loses
        (made(sft=(0.5, 0.1, 0.1)), ["void", "partly", "partly", "partly"]),
        (made(s3ft=(0.5, 0.6, 0.8)), ["partly", "void", "void", "void"]),
    ],
)
def test_verdicts(samples, expected):
    verdicts = ablations.judge(samples, ablations.SETTINGS)
    assert [v.arm for v in verdicts] == ["s3ft", *ablations.ABLATIONS]
    assert [v.verdict for v in verdicts] == expected


def test_a_learner_is_void_by_the_interval_not_the_mean():
    samples = made()
    samples["sft"]["sorted_trained"] = [0.4, 1.0, 0.6]  # above the base in the mean
    full, *_ = ablations.judge(samples, ablations.SETTINGS)
    assert full.verdict == "void" and full.reason.startswith("sums, sorted: SFT did not end above")


def test_claim_is_on_the_card():
    assert find_experiment("s3ft", "ablations") is ablations.EXPERIMENT
    assert find_experiment("s3ft") is evidence.EXPERIMENT
