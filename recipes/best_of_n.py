"""Best of n: sample n answers per prompt, score them, keep the best, and estimate where more samples begin to harm.

    accelerate launch recipes/best_of_n.py --config recipes/best_of_n.yaml
    accelerate launch recipes/best_of_n.py --config recipes/best_of_n.yaml --model_name_or_path DIR_OR_ID \\
        --dataset_name FILE_OR_ID --reward REWARD_MODEL_DIR --gold_reward numeric --gold_column answer

As it stands it runs without a network: the tiny sandbox model, its sums, a proxy reward that likes long answers, and
the exact judge as gold. Several processes share the prompts; what comes out does not depend on their number.

Written to `output_dir`: samples.jsonl (all answers with their scores, what `hfgen bon` reads), best.jsonl (one answer
per prompt), curves.json and curves.png.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, load_dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import TrlParser

from hfgen import sandbox
from hfgen.catalog import list_cards, load
from hfgen.cli.bon import print_curves
from hfgen.decoding import BestOfNSampler, best_of_n_curves, plot_best_of_n
from hfgen.trainers import EnsembleReward

FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
SANDBOX = "sandbox"


@dataclass
class RecipeArguments:
    """What is sampled, and what scores it."""

    output_dir: str = field(metadata={"help": "Where the four files go."})
    model_name_or_path: str = field(default=SANDBOX, metadata={"help": "A causal model, or sandbox."})
    dtype: str = field(default="auto", metadata={"help": "Of the models: auto, float32, bfloat16, float16."})
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM, which must be installed."})
    dataset_name: str = field(default=SANDBOX, metadata={"help": "A file, a folder, a hub id, or sandbox."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a folder or hub dataset."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of prompts: text, or messages."})
    gold_column: str = field(default="gold", metadata={"help": "Column of gold answers, for a judge."})
    reward: str = field(
        default=SANDBOX,
        metadata={"help": "Chooses: a reward model's folder or id, FILE.py:function, an installed judge, or sandbox."},
    )
    gold_reward: str | None = field(default=None, metadata={"help": "Measures: as reward, or left out."})
    num_generations: int = field(default=16, metadata={"help": "n: answers per prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus; 1 keeps all tokens."})
    top_k: int = field(default=0, metadata={"help": "Most probable tokens kept; 0 keeps all."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    batch_size: int = field(default=64, metadata={"help": "Answers generated at a time."})
    seed: int = field(default=0, metadata={"help": "Of the answers and of the bootstrap."})
    penalty: float = field(default=0.5, metadata={"help": "Weight of an ensemble's variance where gold is missing."})


def read_data(args: RecipeArguments) -> Dataset:
    """The prompts, each once, with the other columns a reward may want."""
    path = Path(args.dataset_name)
    if args.dataset_name == SANDBOX:
        dataset = Dataset.from_list(sandbox.tasks.D.rows()).select_columns(["prompt", "gold"])
    elif path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"dataset_name is {path}; give one of {', '.join(FILES)}, a folder or a hub id")
        dataset = load_dataset(FILES[path.suffix], data_files=str(path), split="train")
    else:
        dataset = load_dataset(args.dataset_name, split=args.dataset_split)
    if args.prompt_column not in dataset.column_names or not len(dataset):
        raise ValueError(f"prompt_column is {args.prompt_column!r}; the data has {dataset.column_names}")
    if args.prompt_column != "prompt":
        dataset = dataset.rename_column(args.prompt_column, "prompt")
    seen: dict[str, int] = {}
    for row, prompt in enumerate(dataset["prompt"]):
        first = seen.setdefault(json.dumps(prompt), row)
        if first != row:
            raise ValueError(f"row {row} of the data repeats the prompt of row {first}; leave one out")
    return dataset


def right_or_long(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The sandbox's proxy: right, says the judge, plus a fifth per character - the length bias of many reward models."""
    return [sandbox.tasks.D.judge(p, c) + 0.2 * len(c) for p, c in zip(prompts, completions, strict=True)]


def right(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The sandbox's gold: right, says the judge."""
    return [float(sandbox.tasks.D.judge(p, c)) for p, c in zip(prompts, completions, strict=True)]


def make_reward(spec: str, option: str, args: RecipeArguments, device: torch.device) -> Any:
    """What the option `reward` or `gold_reward` names: a function, or a reward model on `device`."""
    if spec == SANDBOX:
        return right if option == "gold_reward" else right_or_long
    if ".py:" in spec:
        return from_file(spec, option)
    if spec in {card.name for card in list_cards("judges")}:
        return from_judge(load(spec, "judges")(), args.gold_column)
    if (config := Path(spec) / "config.json").is_file():
        if json.loads(config.read_text(encoding="utf-8")).get("model_type") == "reward_ensemble":
            return EnsembleReward(spec, batch_size=args.batch_size)
    elif Path(spec).exists() or "/" not in spec:
        raise ValueError(f"{option} is {spec!r}; give a model's folder or id, FILE.py:function, a judge or {SANDBOX}")
    return AutoModelForSequenceClassification.from_pretrained(spec, dtype=args.dtype).to(device)


def from_file(spec: str, option: str) -> Callable[..., Any]:
    """The function of `path/to/file.py:function`."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"{option} is {spec!r}, but {path} is no file")
    module = ModuleType(Path(path).stem)
    SourceFileLoader(module.__name__, path).exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{option} is {spec!r}, but {path} has no function {name!r}")
    return getattr(module, name)


def from_judge(judge: Callable[..., Any], gold_column: str) -> Callable[..., list[float]]:
    """A reward function of a judge(prompt, answer, gold)."""

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        if gold_column not in columns:
            raise ValueError(f"gold_column is {gold_column!r}, which the data lacks; a judge compares with it")
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [float(judge(*row)) for row in zip(prompts, texts, columns[gold_column], strict=True)]

    return reward


def sample(args: RecipeArguments, dataset: Dataset, state: PartialState) -> list[dict[str, Any]]:
    """Scored answers to all prompts, the same in every process; each process samples its share of the prompts."""
    path = sandbox.path() if args.model_name_or_path == SANDBOX else args.model_name_or_path
    model: Any = str(path)
    if not args.use_vllm:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype).to(state.device)
    reward = make_reward(args.reward, "reward", args, state.device)
    gold = make_reward(args.gold_reward, "gold_reward", args, state.device) if args.gold_reward else None
    sampler = BestOfNSampler(
        model, AutoTokenizer.from_pretrained(path), reward, n=args.num_generations, seed=args.seed,
        batch_size=args.batch_size, use_vllm=args.use_vllm, temperature=args.temperature, top_p=args.top_p,
        top_k=args.top_k, max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    with state.split_between_processes(list(range(len(dataset)))) as mine:
        if mine:
            columns = dataset.select(mine).to_dict()
            samples = sampler.generate(columns.pop("prompt"), **columns)
            scores = {} if gold is None else {"gold": samples.score_with(gold, batch_size=args.batch_size, **columns)}
            rows = [row | {"prompt_id": mine[row["prompt_id"]]} for row in samples.rows(**scores)]
    return sorted(gather_object(rows), key=lambda row: row["prompt_id"])


def by_prompt(rows: list[dict[str, Any]], column: str) -> list[list[Any]]:
    """A column's values, one list per prompt."""
    found: dict[int, list[Any]] = {}
    for row in rows:
        found.setdefault(row["prompt_id"], []).append(row[column])
    return list(found.values())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    (args,) = TrlParser((RecipeArguments,)).parse_args_and_config()
    if args.num_generations < 2:
        raise ValueError(f"num_generations is {args.num_generations}; give 2 or more answers per prompt")
    state = PartialState()
    rows = sample(args, read_data(args), state)
    if state.is_main_process:
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        write_lines(output / "samples.jsonl", rows)
        write_lines(output / "best.jsonl", [row for row in rows if row["chosen"]])
        given = {name: by_prompt(rows, name) for name in ("proxy", "gold", "members") if name in rows[0]}
        found = best_of_n_curves(**given, penalty=args.penalty, seed=args.seed)
        (output / "curves.json").write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
        plot_best_of_n(found, output / "curves.png")
        print_curves(found, Console())
        print(f"written to {output}: samples.jsonl, best.jsonl, curves.json, curves.png")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
