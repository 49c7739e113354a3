"""Data diet: scores against float64 brute force, events against the looks, identity of rows, share, refusals."""

import itertools
import logging
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import DataDietCallback
from hfgen.kit.monitor import SampleTracker, collated, labelled_logits
from hfgen_plugins.callbacks.data_diet.data_diet import gradient_of_row, row_scores

ROWS = [{"input_ids": [(5 * i + j * j) % 24 for j in range(6 + i % 5)]} for i in range(24)]
for number, one in enumerate(ROWS):
    one["labels"] = [t if j >= 2 or number % 2 else -100 for j, t in enumerate(one["input_ids"])]
CLASSES = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(ROWS)]


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=24,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )  # fmt: skip


def bert():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=24)
    config.num_labels = 3
    return BertForSequenceClassification(config)


def build(folder, *callbacks, model=None, rows=ROWS, **options):
    given = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    return Trainer(
        model or tiny(), TrainingArguments(str(folder), **given), train_dataset=rows, eval_dataset=ROWS[:4],
        data_collator=collated, callbacks=list(callbacks),
    )  # fmt: skip


# --- scores ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99), st.sampled_from([0.5, 3.0, 30.0]))
def test_scores_equal_float64_brute_force(n, classes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    norms, right = [], 0
    for z, label in zip(logits.double(), labels.tolist(), strict=True):
        p = (z - z.max()).exp()
        p = p / p.sum()
        norms.append(math.sqrt(sum((float(q) - (k == label)) ** 2 for k, q in enumerate(p))))
        right += int(z.argmax()) == label
    el2n, is_right = row_scores(logits, labels, 0.5).tolist()
    assert el2n == pytest.approx(sum(norms) / n, abs=1e-6) and is_right == (right / n >= 0.5)
    assert row_scores(logits[:0], labels[:0], 0.5).tolist() == [0, 0]


def test_grand_is_the_norm_of_the_hosts_gradient_and_leaves_grad_alone():
    for model, rows in ((tiny(), ROWS), (bert(), CLASSES)):
        model = model.double().eval()
        for row in rows[:3]:
            found = float(gradient_of_row(model, collated([row])))
            assert all(p.grad is None for p in model.parameters())
            model(**collated([row])).loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert found == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in grads)), abs=1e-6)
            model.zero_grad()


def test_a_look_reads_by_index_and_counts_events(tmp_path):
    """Every look is repeated by hand: the columns are means, events and learnt rows, at the rows' own places."""
    by_hand = []

    class Watched(DataDietCallback):
        def look(self, event):
            by_hand.append(
                [row_scores(*next(labelled_logits(event.model, collated([row]))), 0.9).tolist() for row in CLASSES]
            )
            return super().look(event)

    torch.manual_seed(1)
    callback = Watched(every=1, share=1.0, rows=24, batch_size=5)
    build(
        tmp_path, callback, model=bert(), rows=CLASSES, max_steps=40, learning_rate=5e-2, per_device_train_batch_size=12
    ).train()
    data = callback.scored(Dataset.from_list(CLASSES))
    assert callback.looks == len(by_hand) == 41 and callback.fired == 40  # before the first step as well
    total = 0
    for i, row in enumerate(data):
        rights = [look[i][1] for look in by_hand]
        events = sum(a > b for a, b in itertools.pairwise(rights))
        total += events
        assert row["el2n"] == pytest.approx(sum(look[i][0] for look in by_hand) / 41, abs=1e-6)
        assert (row["forgetting_events"], row["learnt"]) == (events, any(rights))
        assert row["input_ids"] == CLASSES[i]["input_ids"]
    last = callback.history[-1]
    assert total > 5 and last["events"] == pytest.approx(total / 24) and last["rows"] == 24
    assert last["right"] == pytest.approx(sum(look[1] for look in by_hand[-1]) / 24)
    assert last["odd"] == sum(look[0] > 1 for look in by_hand[-1]) / 24 and last["epoch"] == 20


def test_flipped_labels_have_the_highest_el2n(tmp_path):
    """Rows whose token says the class, an eighth of them mislabelled: the sheet's use of the score."""
    rows = [{"input_ids": [i % 3, 5 + i % 7, i % 3], "labels": i % 3} for i in range(64)]
    flipped = list(range(3, 64, 8))
    for i in flipped:
        rows[i]["labels"] = (rows[i]["labels"] + 1) % 3
    callback = DataDietCallback(every=5, share=1.0, rows=64)
    build(
        tmp_path, callback, model=bert(), rows=rows, max_steps=40, learning_rate=2e-2, per_device_train_batch_size=32
    ).train()
    data = callback.scored(Dataset.from_list(rows))
    hardest = sorted(range(64), key=lambda i: -data[i]["el2n"])[: len(flipped)]
    assert len(set(hardest) & set(flipped)) >= 7


# --- share and rows -------------------------------------------------------------------------------------------------


def test_the_share_says_how_many_rows(tmp_path, caplog):
    """48 trained rows and 4 looks: a tenth of them pays for 4.8 * 3 / 4 = 3.6 reads at each, or for 0.9 with GraNd."""
    for grand, count in ((False, 3), (True, 1)):
        with caplog.at_level(logging.INFO, "hfgen.data_diet"):
            callback = DataDietCallback(every=2, share=0.1, grand=grand)
            build(tmp_path, callback).train()
        assert len(callback.scores) == count and f"reads {count} of 24 training rows" in caplog.text
    callback = DataDietCallback(share=0.1)
    build(tmp_path, callback, eval_strategy="steps", eval_steps=3, gradient_accumulation_steps=2).train()
    assert [row["step"] for row in callback.history] == [3, 6] and len(callback.scores) == 14
    callback = DataDietCallback(share=0.1)
    build(tmp_path, callback, eval_strategy="epoch", max_steps=-1, num_train_epochs=2).train()
    assert [row["step"] for row in callback.history] == [3, 6] and len(callback.scores) == 7
    assert callback.scores[:, 0].tolist() == [0, 4, 8, 12, 15, 19, 23]
    data = callback.scored(Dataset.from_list(ROWS))
    assert [i for i, row in enumerate(data) if row["el2n"] is not None] == [0, 4, 8, 12, 15, 19, 23]
    assert set(callback.scored(data).column_names) == set(data.column_names)  # again: replaced
    with pytest.raises(ValueError, match=r"rows is 24: reading them at 4 looks takes about 67% of the training's time"):
        build(tmp_path, DataDietCallback(every=2, rows=24)).train()


def test_in_sfttrainer_with_its_fused_head_peft_and_an_index_column(tmp_path):
    rows = [{"prompt": p, "completion": sandbox.tasks.R.gold(p)} for p in sandbox.tasks.R.prompts[:8]]
    args = SFTConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        logging_steps=1, gradient_checkpointing=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    callback = DataDietCallback(every=2, share=1.0, rows=3, grand=True)
    trainer = SFTTrainer(
        sandbox.load_model(), args, train_dataset=Dataset.from_list(rows), processing_class=sandbox.load_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM"), callbacks=[callback],
    )  # fmt: skip
    SampleTracker(trainer)
    trainer.train()
    data = callback.scored(trainer.train_dataset)
    first = data[0]
    assert (
        callback.looks == 3 and first["sample_index"] == 0 and first["grand"] > 0 and 0 < first["el2n"] < math.sqrt(2)
    )
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained)


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"eval_strategy is 'no'; DataDietCallback reads evaluations.*or give every="):
        build(tmp_path, DataDietCallback()).train()
    stream = Dataset.from_list(ROWS[:1] * 8).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset is a .*a stream; DataDietCallback needs one with a length"):
        build(tmp_path, DataDietCallback(every=2), rows=stream).train()
    packed = build(tmp_path, DataDietCallback(every=2))
    packed.args.packing = True
    with pytest.raises(ValueError, match="args.packing is True: a batch row is no longer one training row"):
        packed.train()
    callback = DataDietCallback(every=2, share=1.0)
    with pytest.raises(ValueError, match="no look was taken yet"):
        callback.scored(Dataset.from_list(ROWS))
    build(tmp_path, callback).train()
    with pytest.raises(ValueError, match="dataset has 23 rows and the one trained on had 24; give that one"):
        callback.scored(Dataset.from_list(ROWS[:23]))
    flat = build(tmp_path, DataDietCallback(every=2, share=1.0))
    flat.data_collator = lambda rows: collated(
        [{key: [token for row in rows for token in row[key]] for key in ("input_ids", "labels")}]
    )
    with pytest.raises(ValueError, match="the collator makes 1 rows of 8; DataDietCallback needs one for one"):
        flat.train()
    for options in ({"rows": 0}, {"share": 0.0}, {"right": 1.5}, {"batch_size": 0}, {"every": 0}):
        with pytest.raises(ValueError, match=f"DataDietCallback.{next(iter(options))} is"):
            DataDietCallback(**options)
    with pytest.raises(TypeError, match="DataDietCallback.grand is 1"):
        DataDietCallback(grand=1)


def test_a_resumed_run_with_other_rows_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    build(tmp_path, DataDietCallback(every=2, share=1.0), **options).train()
    again = build(tmp_path, DataDietCallback(every=2, share=1.0), rows=ROWS[:20], **options | {"max_steps": 6})
    with pytest.raises(ValueError, match="the training set has 20 rows and the resumed run had 24"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
