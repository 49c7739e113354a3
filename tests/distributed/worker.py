"""What one process of a launch does: `worker.py FOLDER TASK...`; without a launch, `run` does the same in one process.

`worker.py FOLDER --resume METHOD...` kills and resumes runs of one process each.

A task is `mode/kind/method[/more]`: mode one, ddp or fsdp2; kind one of `KINDS`. Each leaves FOLDER/<task, dots for
slashes>/rank-<n>.json and, of rank 0, tensors.safetensors (all whole, never sharded).
"""

import functools
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.adapters import IncreLoraConfig, IntrinsicConfig, LoLDUConfig, SaraConfig, SomaConfig, SVFitConfig
from hfgen.callbacks import HyperfitCallback, hyperfit_args
from hfgen.kit.monitor import Event, SampleTracker, gradient_norm
from hfgen.quantizers import EasyQuantConfig
from hfgen.trainers import S3FTConfig, S3FTTrainer, build_s3ft_dataset
from hfgen_plugins.trainers.s3ft import data as s3ft_data

if __package__:
    from .fsdp_cpu_shim import fsdp2
else:
    from fsdp_cpu_shim import fsdp2

D, R = sandbox.tasks.D, sandbox.tasks.R
QUIET = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    "logging_steps": 1, "save_strategy": "no", "ddp_timeout": 60,
}  # fmt: skip
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "svfit": lambda: SVFitConfig(r=8, **TARGETS),
    "svfit_decay": lambda: SVFitConfig(r=8, decay_to_init=True, **TARGETS),
    "loldu": lambda: LoLDUConfig(r=8, **TARGETS),
    "loldu_scale": lambda: LoLDUConfig(r=8, train_scale=True, **TARGETS),
    "soma": lambda: SomaConfig(r=8, **TARGETS),
    # grows after steps 3, 5 and 7 (checkpoints: 2, 4, 6, 8), by scores of every step
    "increlora": lambda: IncreLoraConfig(
        target_total_rank=11, init_warmup=1, incre_interval=2, top_h=2, warmup_steps=2, score_window=None, **TARGETS
    ),
    "sara": lambda: SaraConfig(
        density=0.1, nuclear_weight=1e-4, nuclear_min_dim=16, progressive_at=5, reset_state_on_progress=True, **TARGETS
    ),
    "intrinsic": lambda: IntrinsicConfig(d=256, **TARGETS),
    "intrinsic_said": lambda: IntrinsicConfig(d=256, mode="said", projection_scope="per_tensor", **TARGETS),
    "s3ft": lambda: LoraConfig(r=8, lora_alpha=16, **TARGETS),
    "sft": lambda: None,
    "hyperfit": lambda: None,
    "hyperfit_trainer": lambda: None,
    "easyquant_lora": lambda: LoraConfig(r=8, lora_alpha=16, **TARGETS),
    "easyquant_svfit": lambda: SVFitConfig(r=8, **TARGETS),
}
# Peaks of the recipes: recipes/classify.yaml (1e-2), recipes/s3ft.yaml, hyperfit's evidence at this size, LoRA's.
RATES = {
    "s3ft": 1e-4,
    "sft": 1e-3,
    "hyperfit": 1e-3,
    "hyperfit_trainer": 1e-3,
    "easyquant_lora": 1e-3,
    "soma": 1e-3,
    "sara": 1e-3,
}


@functools.cache
def rows():
    """32 rows of two lengths, so that micro-batches hold different numbers of tokens."""
    mixed = [
        task.rows([p])[0]
        for pair in zip(D.prompts[:16], R.prompts[:16], strict=True)
        for task, p in zip((D, R), pair, strict=True)
    ]
    return Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in mixed])


@functools.cache
def held_out():
    tokenizer = sandbox.load_tokenizer()
    return [tokenizer(p + R.gold(p))["input_ids"][:8] for p in R.prompts[40:44]]


def built(folder):
    """S3FT data, made by all processes together."""
    args = S3FTConfig(str(folder), s3ft_max_new_tokens=24, s3ft_batch_size=4, **QUIET)
    data = Dataset.from_list(D.rows(D.prompts[:16]))
    return build_s3ft_dataset(
        sandbox.load_model(), data, D.judge, sandbox.tasks.oracle_paraphraser, sandbox.load_tokenizer(), args
    )


def trainer_of(method, folder, data=None, dtype="float32", callbacks=(), **changes):
    """A trainer of the method on the sandbox: SFTTrainer, or the method's own."""
    torch.manual_seed(0)
    quantization = EasyQuantConfig(bits=4) if method.startswith("easyquant") else None
    model = sandbox.load_model(dtype=getattr(torch, dtype), quantization_config=quantization)
    options = {"learning_rate": RATES.get(method, 1e-2), "per_device_train_batch_size": 4, "max_steps": 8, **QUIET}
    shared = {"processing_class": sandbox.load_tokenizer(), "peft_config": ADAPTERS[method]()}
    if method == "s3ft":
        args = S3FTConfig(str(folder), s3ft_max_new_tokens=24, s3ft_batch_size=4, **{**options, **changes})
        judged = {"judge": D.judge, "paraphraser": sandbox.tasks.oracle_paraphraser}
        data = Dataset.from_list(D.rows(D.prompts[:16])) if data is None else data
        return S3FTTrainer(model, args=args, train_dataset=data, callbacks=list(callbacks), **judged, **shared)
    if method.startswith("hyperfit"):
        options = {**hyperfit_args(), **options}
        callbacks = [hyperfit(), *callbacks]
    if method == "hyperfit_trainer":
        tokenizer = shared.pop("processing_class")
        ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows()]
        tokens = Dataset.from_dict({"input_ids": ids, "labels": ids})
        args = TrainingArguments(str(folder), **{**options, **changes})
        collator = DataCollatorForSeq2Seq(tokenizer)
        return Trainer(model, args, train_dataset=tokens, data_collator=collator, callbacks=list(callbacks))
    args = SFTConfig(str(folder), completion_only_loss=True, **{**options, **changes})
    return SFTTrainer(model, args=args, train_dataset=rows(), callbacks=list(callbacks), **shared)


def hyperfit(stop_loss=None):
    return HyperfitCallback(
        stop_loss=stop_loss, held_out=held_out(), every=2, sequences=4, length=8, context=4, new_tokens=8, window=6
    )


def whole(tensor):
    """A copy of all of a tensor, sharded or not (a collective)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def trained_part(model):
    return {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}


def fitted(tensor, shape):
    """The tensor in the shape it has at the end: zeros in what has grown, without what was dropped."""
    common = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    new = tensor.new_zeros(shape)
    new[common] = tensor[common]
    return new


def digest(tensors):
    data = b"".join(name.encode() + t.contiguous().numpy().tobytes() for name, t in sorted(tensors.items()))
    return hashlib.sha256(data).hexdigest()


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def wrapped(trainer, mode):
    """Assert that the run was of the kind it was meant to be."""
    accelerator = trainer.accelerator
    assert accelerator.is_fsdp2 == (mode == "fsdp2"), accelerator.distributed_type
    assert accelerator.num_processes == (1 if mode == "one" else 2)
    sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    assert sharded == (mode == "fsdp2")


TWO = {"per_device_train_batch_size": 2}  # rows of each of two processes


# --- kinds of tasks: each gives (facts for JSON, tensors) -----------------------------------------------------------


def train(mode, folder, method):
    """Eight AdamW steps; the adapter saved and, in one process, nothing more."""
    # scores are of micro-batches, so IncreLoRA's one process cuts its rows as two processes do
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} if method == "increlora" else {}
    trainer = trainer_of(method, folder, **({"per_device_train_batch_size": 4} | cut if mode == "one" else TWO))
    start = trained_part(trainer.model)
    trainer.train()
    wrapped(trainer, mode)
    end = trained_part(trainer.model)
    start = {n: fitted(t, end[n].shape) for n, t in start.items()}
    trainer.save_model(str(folder / "saved"))
    facts = {"losses": losses(trainer), "equal": digest(end)}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, HyperfitCallback):
            facts["history"] = callback.history
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.arange(4, 24).view(2, 10)).logits
    if mode == "fsdp2" and method in ("svfit", "loldu"):
        facts["merge"] = said(trainer.model.merge_adapter)
        facts["add"] = said(trainer.model.add_adapter, "second", ADAPTERS[method]())
    return facts, {"logits": whole(logits)} | {f"start.{n}": t for n, t in start.items()} | {
        f"end.{n}": t for n, t in end.items()
    }


def said(function, *args):
    """The words in which a call is refused."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return "nothing"


def stop(mode, folder, method):
    """Where hyperfit's rule ends a run of twenty steps."""
    callback = hyperfit(stop_loss=2.0)
    size = 4 if mode == "one" else 2
    trainer = trainer_of("sft", folder, callbacks=[callback], max_steps=20, per_device_train_batch_size=size)
    trainer.train()
    wrapped(trainer, mode)
    return {"step": trainer.state.global_step, "fired": callback.fired, "history": callback.history}, {}


def ram_efficient(mode, folder, method):
    """With weights that only the first process is meant to read: what is said."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    assert SFTConfig(str(folder), **QUIET).device.type == "cpu"  # the processes meet before the model is loaded
    return {"said": said(trainer_of, method, folder)}, {}


class Gradient(TrainerCallback):
    """Keeps the gradient of the first step, and the kit's norm of it."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = kwargs["model"]
        event = Event(
            args,
            state,
            control,
            **{k: kwargs.get(k) for k in Event.__annotations__ if k not in ("args", "state", "control")},
        )
        self.norm = float(gradient_norm(event))
        self.found = {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def accumulate(mode, folder, method, dtype, cut):
    """One SGD step on the first eight rows, cut as BATCHxPARTS in each process."""
    size, parts = map(int, cut.split("x"))
    seen = Gradient()
    data = built(folder.parent / "s3ft data") if method == "s3ft" else None
    trainer = trainer_of(
        method, folder, data, dtype, [seen], per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        max_steps=1, optim="sgd", learning_rate=0.1, warmup_steps=0, lr_scheduler_type="constant", max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    start = trained_part(trainer.model)
    assert {t.dtype for t in start.values()} == {getattr(torch, dtype)}
    trainer.train()
    wrapped(trainer, mode)
    step = {f"step.{n}": t - start[n] for n, t in trained_part(trainer.model).items()}
    return {"norm": seen.norm}, step | {f"grad.{n}": t for n, t in seen.found.items()}


class Watch(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_substep_end(self, *args, **kwargs):
        self.seen.append(self.tracker.current.tolist())

    on_step_end = on_substep_end


def indices(mode, folder, method):
    """One epoch with a SampleTracker: the indices this process saw."""
    watch = Watch()
    trainer = trainer_of(
        method, folder, callbacks=[watch], max_steps=-1, num_train_epochs=1, per_device_train_batch_size=2
    )
    watch.tracker = SampleTracker(trainer)
    trainer.train()
    wrapped(trainer, mode)
    return {"seen": watch.seen, "rows": len(trainer.train_dataset)}, {}


def broadcast(mode, folder, method):
    """Bytes that DDP broadcasts at every forward."""
    trainer = trainer_of(method, folder, max_steps=1, per_device_train_batch_size=2)
    trainer.train()
    buffers = trainer.model_wrapped.modules_buffers
    return {"bytes": sum(b.numel() * b.element_size() for b in buffers), "buffers": len(buffers)}, {}


def half(mode, folder, method):
    """Mixed precision bfloat16: losses, or what is said."""
    trainer = trainer_of(method, folder, per_device_train_batch_size=2, bf16=True)
    words = said(trainer.train)
    wrapped(trainer, mode)
    return {"said": words, "losses": losses(trainer)}, {}


# --- killed and resumed: `whole` goes through; `cut` is killed in its fifth step of eight; `again` goes on with it ---


class Kill(TrainerCallback):
    """Ends the process when the gradient of step 6 is there: checkpoints are at even steps."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 5 and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def saving(mode, folder, method, name, *callbacks):
    size = 4 if mode == "one" else 2
    return trainer_of(
        method, folder.parent / f"{mode}.{method}.{name}", callbacks=callbacks, per_device_train_batch_size=size,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip


def whole_run(mode, folder, method):
    trainer = saving(mode, folder, method, "whole")
    trainer.train()
    wrapped(trainer, mode)
    return {"step": trainer.state.global_step}, trained_part(trainer.model)


def cut(mode, folder, method):
    saving(mode, folder, method, "cut", Kill()).train()
    raise AssertionError("it lives")


def cut_data(mode, folder, method):
    """Killed in the middle of a line of its third block of data."""
    append, written = s3ft_data._Cache.append, []

    def dies(self, block, rows):
        append(self, block, rows)
        written.append(block)
        if len(written) == 3:
            with self.part.open("a") as file:
                file.write('{"block": 7, "rows": [{"sou')
            os.kill(os.getpid(), signal.SIGKILL)

    s3ft_data._Cache.append = dies
    saving(mode, folder, method, "cut")
    raise AssertionError("it lives")


def again(mode, folder, method):
    trainer = saving(mode, folder, method, "cut")
    trainer.train(resume_from_checkpoint=True)
    wrapped(trainer, mode)
    steps = [row["step"] for row in trainer.state.log_history if "loss" in row]
    return {"step": trainer.state.global_step, "steps": steps}, trained_part(trainer.model)


def resume(folder, methods):
    """Each run is a process of its own, forked from this one, which has imported the libraries and done nothing."""
    for method in methods:
        for kind in ("whole_run", *(["cut_data"] if method == "s3ft" else []), "cut", "again"):
            child = os.fork()
            if not child:
                facts, _ = run(f"one/{kind}/{method}", folder)
                os._exit(1 if "error" in facts else 0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            (Path(folder) / f"one.{method}.{kind}.code").write_text(str(code))


KINDS = {
    f.__name__: f
    for f in (train, accumulate, indices, broadcast, stop, ram_efficient, half, whole_run, cut, cut_data, again)
}


def run(task, folder):
    """Runs one task; (facts, tensors), which are written too. An error is a fact."""
    mode, kind, *options = task.split("/")
    own = Path(folder) / task.replace("/", ".")
    own.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with fsdp2() if mode == "fsdp2" else nullcontext():
        try:
            facts, tensors = KINDS[kind](mode, own, *options)
        except Exception as error:  # the parent reads and judges it
            facts, tensors = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}, {}
    rank = int(os.environ.get("RANK", 0))
    facts["seconds"] = round(time.perf_counter() - start, 2)
    (own / f"rank-{rank}.json").write_text(json.dumps(facts))
    if rank == 0 and tensors:
        save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, own / "tensors.safetensors")
    return facts, tensors


if __name__ == "__main__":
    if sys.argv[2] == "--resume":
        resume(sys.argv[1], sys.argv[3:])
    else:
        for task in sys.argv[2:]:
            if "error" in run(task, sys.argv[1])[0]:
                sys.exit(f"{task} failed")  # the launcher ends the other process, which may wait for this one
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            sys.stdout.flush()
            os._exit(0)  # all is written; gloo's threads have aborted an interpreter that was leaving by itself
