"""One process of a launch: the histories of four monitors, `monitors.py MODE FOLDER`; MODE is one, ddp or fsdp2."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from fsdp_cpu_shim import fsdp2
from transformers import Trainer

from hfgen.callbacks import GrokkingCallback, InstabilityCallback, SoftmaxCollapseCallback, StabilityGapCallback
from hfgen.kit.examples import tiny_run

ROWS = [
    {"input_ids": (ids := [(7 * i + j * j) % 32 for j in range(12)]), "labels": [-100] * (i % 3) + ids[i % 3 :]}
    for i in range(32)
]


def accuracy(prediction):
    right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": float(right[prediction.label_ids[:, 1:] != -100].mean())}


def main(mode, folder):
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    callbacks = [
        SoftmaxCollapseCallback(every=2, rows=12), InstabilityCallback(every=2, rows=12),
        GrokkingCallback(test="a", rows=12), StabilityGapCallback(["a", "b"], ends=[2], every=2, samples=7),
    ]  # fmt: skip
    with fsdp2() if mode == "fsdp2" else nullcontext() as extra:
        run = tiny_run(
            str(folder / mode), evaluate_every=2, layers=2, max_steps=4, per_device_train_batch_size=8 // ranks,
            per_device_eval_batch_size=4, learning_rate=1e-3, save_strategy="no", **(extra or {}),
        )  # fmt: skip
        with torch.no_grad():
            run["model"].lm_head.weight.mul_(300)  # logits far apart
        data = {"train_dataset": ROWS[:24], "eval_dataset": {"a": ROWS[:8], "b": ROWS[24:]}}
        trainer = Trainer(
            **run | data, callbacks=callbacks, compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )  # fmt: skip
        callbacks[-1].attach(trainer)
        trainer.train()
    found = {type(callback).__name__: callback.history for callback in callbacks}
    (folder / f"{mode}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads do not always end
