"""Hyperfitting: its metrics against brute force, the stop rule, the schedule, what it refuses."""

import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import HyperfitCallback, hyperfit_args
from hfgen_plugins.callbacks.hyperfit.hyperfit import (
    QUOTE,
    _continue,
    _ngram_hashes,
    _predictions,
    _training_quotes,
    example,
    longest_quote,
    repeated_ngrams,
    self_bleu,
    type_token_ratio,
)

ROWS = [[(5 * i + j * j) % 24 for j in range(12)] for i in range(16)]


def tiny(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=24,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None, **options)
    )  # fmt: skip


def monitor(**options):
    small = {"held_out": ROWS[8:], "every": 2, "sequences": 4, "length": 12, "context": 4, "new_tokens": 8, "window": 6}
    return HyperfitCallback(**{**small, **options})


def run(folder, callback, model=None, **options):
    given = {
        **hyperfit_args(), "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **options,
    }  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in ROWS[:8]]
    trainer = Trainer(
        model or tiny(), TrainingArguments(str(folder), **given), train_dataset=data, callbacks=[callback]
    )
    trainer.train()
    return trainer


# --- metrics ------------------------------------------------------------------------------------------------------


def test_predictions_equal_float64_brute_force():
    model, ids = tiny().eval(), torch.tensor(ROWS[:3])
    with torch.no_grad():
        found = _predictions(model, ids)
        logits = model(ids).logits.double()
    expected = []
    for row, targets in zip(logits, ids, strict=True):
        for position in range(11):
            p = row[position].exp() / row[position].exp().sum()
            expected.append(
                (-math.log(p[targets[position + 1]]), -sum(float(q) * math.log(q) for q in p), float(p.max()))
            )
    torch.testing.assert_close(found.T.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_entropy_of_certain_and_of_uniform_predictions():
    model = tiny().eval()
    ids = torch.tensor(ROWS[:1])
    with torch.no_grad():
        model.lm_head.weight.zero_()
        loss, entropy, top1 = _predictions(model, ids).mean(1).tolist()
        assert loss == pytest.approx(math.log(24)) and entropy == pytest.approx(math.log(24))
        assert top1 == pytest.approx(1 / 24)
        model.lm_head.weight[7] = 1e4 * model.model(ids).last_hidden_state[0, 0]
        assert _predictions(model, ids)[1:, 0].tolist() == [0.0, 1.0]  # p = 0 gives no nan


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(1, 9))
def test_text_metrics_equal_brute_force(rows, n):
    tokens = torch.tensor(rows)
    assert type_token_ratio(tokens) == pytest.approx(sum(len(set(r)) / 9 for r in rows) / len(rows))
    seen = [sum(r[i : i + n] in [r[j : j + n] for j in range(i)] for i in range(10 - n)) / (10 - n) for r in rows]
    assert repeated_ngrams(tokens, n) == pytest.approx(sum(seen) / len(rows))
    assert repeated_ngrams(tokens, 10) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=10, max_size=14), st.lists(st.integers(0, 3), min_size=10, max_size=40))
def test_quoted_equals_brute_force(text, training):
    class Loader:
        dataset = [{"input_ids": training}, {"input_ids": [1] * 7}]  # the second row is too short to quote

    known = {tuple(training[i : i + QUOTE]) for i in range(len(training) - QUOTE + 1)}
    expected = [tuple(text[i : i + QUOTE]) in known for i in range(len(text) - QUOTE + 1)]
    assert np.isin(_ngram_hashes(np.array([text]), QUOTE)[0], _training_quotes(Loader)).tolist() == expected


def test_self_bleu():
    assert self_bleu(torch.tensor([[1, 2, 3, 4, 5]] * 3)) == pytest.approx(1.0)
    assert self_bleu(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])) == 0.0 == self_bleu(torch.tensor([[1, 2, 3, 4]]))
    # by hand, 2-grams at most: row 1 shares 3 of 4 tokens and 1 of 3 pairs (12), the other way round the same
    found = self_bleu(torch.tensor([[1, 2, 9, 3], [3, 1, 2, 4]]), n=2)
    assert found == pytest.approx(math.sqrt(3 / 4 * 1 / 3))
    # counts are clipped: 1 1 1 1 against one 1
    assert self_bleu(torch.tensor([[1, 1, 1, 1], [1, 2, 3, 4]]), n=1) == pytest.approx((1 / 4 + 1 / 4) / 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_longest_quote_equals_brute_force(rows):
    runs = ["".join("x" if known else " " for known in row).split() for row in rows]
    longest = max((len(run) for row in runs for run in row), default=0)
    assert longest_quote(np.array(rows)) == (longest + QUOTE - 1 if longest else 0)


def test_what_cannot_be_read_is_said_once(caplog):
    class Stream:
        dataset = iter([])

    with caplog.at_level(logging.INFO, "hfgen.hyperfit"):
        assert _training_quotes(Stream) is None
    assert "'quoted' is left out" in caplog.text


def test_continuations_are_greedy_whatever_the_models_own_settings_say():
    model = tiny().eval()
    context = torch.tensor(ROWS[:3])[:, :4]
    with torch.no_grad():
        text, entropy = _continue(model, context, 6)
        ids = context
        for step in range(6):  # without a cache, by hand
            log_p = model(ids).logits[:, -1].log_softmax(-1)
            torch.testing.assert_close(entropy[:, step], -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5)
            ids = torch.cat((ids, log_p.argmax(-1, keepdim=True)), 1)
        assert torch.equal(text, ids[:, 4:])
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=3.0, top_k=5, repetition_penalty=1.5, num_beams=2, no_repeat_ngram_size=2,
            max_length=5, pad_token_id=3,
        )  # fmt: skip
        again, _ = _continue(model, context, 6)
    assert torch.equal(again, text)


def test_the_end_token_is_held_back():
    model = tiny().eval()
    context = torch.tensor(ROWS[:2])[:, :4]
    first, _ = _continue(model, context, 3)
    model.generation_config.eos_token_id = int(first[0, 0])
    text, _ = _continue(model, context, 8)
    assert text.shape == (2, 8) and not (text == int(first[0, 0])).any()


# --- the callback in a run ------------------------------------------------------------------------------------------


def test_it_looks_before_at_every_interval_and_at_the_end(tmp_path):
    callback = monitor(stop_loss=None, every=4)
    trainer = run(tmp_path, callback)
    assert [found["step"] for found in callback.history] == [0, 4, 6]
    rows = [row for row in trainer.state.log_history if "hfgen/hyperfit/ttr" in row]
    assert [row["hfgen/hyperfit/step"] for row in rows] == [0, 4, 6]
    assert set(callback.history[0]) == {
        "step", "val_loss", "entropy", "top1", "ttr", "seq_rep_4", "self_bleu", "greedy_entropy", "quoted", "longest_quote"
    }  # fmt: skip


def test_it_stops_at_near_zero_loss_and_looks_there(tmp_path):
    callback = monitor(stop_loss=0.05, every=1000)
    trainer = run(tmp_path, callback, max_steps=400, learning_rate=3e-2)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.05 and all(loss >= 0.05 for loss in losses[:-1])
    assert trainer.state.global_step < 400 and callback.fired == 1
    assert callback.history[-1]["step"] == trainer.state.global_step
    assert trainer.state.log_history[-2]["hfgen/hyperfit/step"] == trainer.state.global_step
    before, after = callback.history
    assert after["entropy"] < before["entropy"] and after["top1"] > before["top1"]


def test_a_run_that_never_came_near_zero_says_so(tmp_path, caplog):
    run(tmp_path, monitor())
    assert "the run ended at step 6 and a training loss below stop_loss never happened" in caplog.text


def test_in_sfttrainer_with_the_trainers_own_rows(tmp_path):
    rows = Dataset.from_list([{"text": f"R{'abcdefghij'[i:]}={'jihgfedcba'[:i]}"} for i in range(10)])
    callback = HyperfitCallback(stop_loss=None, every=2, sequences=3, length=8, context=3, new_tokens=8, window=4)
    args = SFTConfig(
        str(tmp_path), **{**hyperfit_args(), "per_device_train_batch_size": 4}, max_steps=2, use_cpu=True, bf16=False,
        gradient_checkpointing=True, report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        sandbox.load_model(), args, train_dataset=rows, eval_dataset=rows, callbacks=[callback],
        processing_class=sandbox.load_tokenizer(),
    )  # fmt: skip
    callback.attach(trainer)
    trainer.train()
    assert [found["step"] for found in callback.history] == [0, 2]
    direct = [row for row in trainer.state.log_history if "hfgen/hyperfit/ttr" in row and "loss" not in row]
    assert len(direct) == 2  # through Trainer.log: rows of their own
    assert all(len(ids) == 8 for ids in callback.held_out)


def test_departures_from_the_recipe_are_said(tmp_path, caplog):
    run(
        tmp_path, monitor(stop_loss=None), model=tiny(attention_dropout=0.1), lr_scheduler_type="linear", warmup_steps=2
    )
    for words in ("lr_scheduler_type is 'linear'", "warmup_steps is 2", "dropout is on"):
        assert words in caplog.text
    caplog.clear()
    run(tmp_path, monitor(stop_loss=None))
    assert "departed" not in caplog.text


def test_the_recipe():
    paper, repo = hyperfit_args(), hyperfit_args("repo")
    assert (paper["learning_rate"], paper["num_train_epochs"], paper["weight_decay"]) == (1e-6, 20, 0.0)
    assert (repo["learning_rate"], repo["num_train_epochs"], repo["weight_decay"]) == (5e-6, 30, 0.01)
    for recipe in (paper, repo):
        args = TrainingArguments("x", **recipe)
        assert args.lr_scheduler_type == "constant" and not args.warmup_steps and not args.load_best_model_at_end
    with pytest.raises(ValueError, match="hyperfit_args.variant is 'Paper'; did you mean 'paper'"):
        hyperfit_args("Paper")


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_the_best_model_and_a_hidden_loss_are_refused(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=2, save_steps=2, **best)
    data = [{"input_ids": ids, "labels": ids} for ids in ROWS]
    both = [monitor(), EarlyStoppingCallback()]
    with pytest.raises(ValueError, match="args.load_best_model_at_end is True; set it to False"):
        Trainer(tiny(), args, train_dataset=data, eval_dataset=data, callbacks=both).train()
    with pytest.raises(
        ValueError, match=r"logging_strategy is 'no'.*set 'steps', or HyperfitCallback\(stop_loss=None\)"
    ):
        run(tmp_path, monitor(), logging_strategy="no")


def test_held_out_rows_are_checked(tmp_path):
    with pytest.raises(ValueError, match="held_out has 2 rows of at least length=12 tokens; give 4"):
        monitor(held_out=ROWS[:2])
    with pytest.raises(ValueError, match="held_out has 0 rows of at least length=13 tokens"):
        monitor(length=13)
    with pytest.raises(TypeError, match="held_out has a row that is not tokens .*tokenise it"):
        monitor(held_out=[{"text": "abc"}])
    with pytest.raises(TypeError, match="held_out has a row that is not tokens"):
        monitor(held_out=["abc"])
    with pytest.raises(ValueError, match="held_out is None and no trainer with an eval_dataset is attached"):
        run(tmp_path, monitor(held_out=None))
    kinds = (Dataset.from_dict({"input_ids": ROWS}), [torch.tensor(r) for r in ROWS], [np.array(r) for r in ROWS], ROWS)
    assert all(monitor(held_out=rows).held_out == ROWS[:4] for rows in kinds)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "HyperfitCallback.every is 0; give an integer of at least 1"),
        ({"stop_loss": -1.0}, "HyperfitCallback.stop_loss is -1.0"),
        ({"stop_loss": "low"}, "HyperfitCallback.stop_loss is 'low'"),
        ({"context": 20}, "HyperfitCallback.context is 20; give at most 12, the value of length"),
        ({"window": 9}, "HyperfitCallback.window is 9; give at most 8, the value of new_tokens"),
        ({"trainer": 3}, "HyperfitCallback.trainer is 3; give the transformers Trainer"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        monitor(**options)


def test_the_cards_example_runs(tmp_path):
    options = example(str(tmp_path))
    Trainer(**options).train()
    assert options["callbacks"][0].fired == 4
