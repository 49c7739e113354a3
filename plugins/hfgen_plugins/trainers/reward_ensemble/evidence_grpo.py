"""RL against one reward model and against five: GRPO and RLOO at equal steps, and what gold says of the policies.

The over-optimising design of ``evidence.py`` with a policy in the place of best-of-n. A language model of 0.1 million
parameters writes answers of 8 tokens, at first drawn from 24 common tokens and, rarely, 400 rare ones; reward models see
800 pairs of its own answers labelled by gold, 25 % of the labels flipped; trl's stock trainers then optimise the policy
for one of the five members or for all of them. The tries are in ``tuning-grpo.json`` beside this file, by

    python -m hfgen_plugins.trainers.reward_ensemble.evidence_grpo tune

torch is imported in the workers only.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfgen.evidence import Arm, Experiment, Metric, Verdict, at_least, at_most, interval, paired, tuning, verdict
from hfgen.evidence.jobs import trainer_progress
from hfgen.evidence.tuning import Row, best_rate, try_grid

from . import evidence
from .evidence import COMMON, LENGTH, RARE

# arm -> (algorithm, how the reward is made)
RUNS = {f"{rl}_{how}": (rl, how) for rl in ("grpo", "rloo") for how in ("single", "mean", "wco")}
WORDS = {"single": "one reward model", "mean": "mean of 5", "wco": "WCO of 5"}
ARMS = (
    Arm("base", "untouched policy"),
    *(Arm(name, f"{rl.upper()}, {WORDS[how]}") for name, (rl, how) in RUNS.items()),
)
JUDGED = tuple(name for name, (_, how) in RUNS.items() if how != "single")
RATES, BETAS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.0, 0.01, 0.03, 0.1)
TUNING_SEEDS = (100, 101)
TUNING_FILE = Path(__file__).with_name("tuning-grpo.json")
CRITERION = "highest mean gold of the final policy, then the lower value; no peak and no proxy is looked at"
TOKENS, PROMPT = COMMON + RARE, "? "
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "?")  # after the tokens, so that token i of the design has id i


@dataclass(frozen=True)
class World:
    """What all arms of a seed share. `seed` draws gold, the policy, pairs and the members' starts.

    Attributes:
        design: Gold, reward models and their training, as in ``evidence.py``; its answers are not drawn.
        noise: Share of the labels that are flipped.
        hidden_size: Of the policy, a Llama of one layer.
        sft_steps, sft_rate, sft_batch: How the policy learns to draw answers of the design.
    """

    design: evidence.Settings = evidence.SETTINGS
    noise: float = 0.25
    hidden_size: int = 64
    sft_steps: int = 200
    sft_rate: float = 1e-2
    sft_batch: int = 128


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed.

    Attributes:
        world: Before RL.
        steps, batch_size, generations: Of GRPO and RLOO: answers per step, answers per group.
        rates: Per arm, the peak of a linear decay to 0.
        betas: Per arm, the weight of the KL term; 0 leaves it out.
        looks, answers: How often a policy is measured, evenly over the steps, and on how many answers.
    """

    world: World = World()
    steps: int = 150
    batch_size: int = 64
    generations: int = 16
    rates: dict[str, float] = field(
        default_factory=lambda: {
            "grpo_single": 3e-3,
            "grpo_mean": 3e-3,
            "grpo_wco": 1e-2,
            "rloo_single": 3e-3,
            "rloo_mean": 1e-2,
            "rloo_wco": 1e-2,
        }
    )
    betas: dict[str, float] = field(
        default_factory=lambda: {
            "grpo_single": 0.0,
            "grpo_mean": 0.0,
            "grpo_wco": 0.03,
            "rloo_single": 0.0,
            "rloo_mean": 0.0,
            "rloo_wco": 0.03,
        }
    )
    looks: int = 10
    answers: int = 1024


SETTINGS = Settings()


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Optimises the policy for one reward and measures it on the way; plain numbers by metric key (see `METRICS`)."""
    made = _made(seed, settings.world)
    if arm == "base":
        looks, seconds = [made.look(made.base, made.reward("single"), settings.answers)], 0.0
    else:
        looks, seconds = _optimise(arm, seed, settings, made, report)
    first, last, peak = looks[0], looks[-1], max(look["gold"] for look in looks)
    own = {"peak": peak, "fall": peak - last["gold"], "gain": last["proxy"] - first["proxy"]}
    return {**last, **own, "accuracy": made.accuracy, "seconds": seconds}


@dataclass(frozen=True)
class _Made:
    """A world that is made: the untouched policy, what gold and the trained members say, how a policy is measured."""

    seed: int
    base: Any
    tokenizer: Any
    gold_of: Callable[[Any], Any]
    ensemble: Any
    accuracy: float

    def reward(self, how: str) -> Callable[..., Any]:
        """What trl's trainers take as reward: an EnsembleReward, or the first of its members, standardised."""
        import torch

        from . import EnsembleReward
        from .scoring import standardize

        whole = EnsembleReward(
            self.ensemble, self.tokenizer, batch_size=512, aggregation="mean" if how == "single" else how
        )
        if how != "single":
            return whole
        level = [torch.tensor(v) for v in (self.ensemble.config.calibration_mean, self.ensemble.config.calibration_std)]

        def single(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return standardize(whole.member_scores(prompts, completions), *level)[:, 0].tolist()

        return single

    def look(self, policy: Any, reward: Callable[..., Any], count: int) -> dict[str, float]:
        """Of `count` answers: gold, proxy, KL to the untouched policy (nats per answer), share of rare tokens."""
        import torch

        ids, kl = _sample(policy, self.tokenizer, count, self.seed, self.base)
        texts = self.tokenizer.batch_decode(ids)
        proxy = torch.tensor(reward([PROMPT] * count, texts), dtype=torch.float64)
        return {
            "gold": float(self.gold_of(ids).mean()), "proxy": float(proxy.mean()), "kl": kl,
            "rare": float((ids >= COMMON).double().mean()),
        }  # fmt: skip


@functools.lru_cache(maxsize=1)  # a worker takes the arms of one seed one after the other
def _made(seed: int, world: World) -> _Made:
    import torch

    draw, tokenizer = torch.Generator().manual_seed(seed), _tokenizer()
    gold_of = evidence._gold(draw, world.design)
    base = _policy(seed, draw, world, tokenizer).eval().requires_grad_(False)
    return _Made(seed, base, tokenizer, gold_of, *_members(seed, world, tokenizer, gold_of, base))


def _tokenizer() -> Any:
    """One token per word: ``c0`` .. of the common tokens, ``r0`` .. of the rare ones, then `SPECIAL`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*(f"c{i}" for i in range(COMMON)), *(f"r{i}" for i in range(RARE)), *SPECIAL]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos, unk, _ = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _policy(seed: int, draw: Any, world: World, tokenizer: Any) -> Any:
    """A Llama that has learnt to answer as the design draws answers: common tokens, and rare ones with their mass."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    size = world.hidden_size
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size, intermediate_size=2 * size, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=world.sft_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, world.sft_steps)
    start = torch.tensor(tokenizer(PROMPT)["input_ids"]).repeat(world.sft_batch, 1)
    for _ in range(world.sft_steps):
        ids = torch.randint(COMMON, (world.sft_batch, LENGTH), generator=draw)
        odd = torch.rand(ids.shape, generator=draw) < world.design.rare_mass
        ids = torch.where(odd, COMMON + torch.randint(RARE, ids.shape, generator=draw), ids)
        labels = torch.cat([torch.full_like(start, -100), ids], 1)
        model(input_ids=torch.cat([start, ids], 1), labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def _sample(model: Any, tokenizer: Any, count: int, seed: int, base: Any = None) -> tuple[Any, float]:
    """`count` answers (count, 8) of the policy, and the mean of log p - log p of `base` over them, in nats."""
    import torch

    start = torch.tensor(tokenizer(PROMPT)["input_ids"]).repeat(count, 1)
    draw, training, ids = torch.Generator().manual_seed(seed), model.training, start
    model.eval()

    def logs(of: Any, ids: Any) -> Any:
        scores = of(input_ids=ids).logits.double()
        scores[..., TOKENS:] = -torch.inf
        return scores.log_softmax(-1)

    with torch.no_grad():
        for _ in range(LENGTH):
            ids = torch.cat([ids, torch.multinomial(logs(model, ids)[:, -1].exp(), 1, generator=draw)], 1)
        answers, kl = ids[:, start.shape[1] :], 0.0
        if base is not None:
            both = [
                logs(m, ids)[:, start.shape[1] - 1 : -1].gather(2, answers[..., None]).sum((1, 2))
                for m in (model, base)
            ]
            kl = float((both[0] - both[1]).mean())
    model.train(training)
    return answers, kl


def _members(seed: int, world: World, tokenizer: Any, gold_of: Any, policy: Any) -> tuple[Any, float]:
    """The ensemble, trained on pairs of the policy's own answers, and its members' accuracy on held-out pairs."""
    from datasets import Dataset, disable_progress_bars
    from torch import nn
    from transformers import PrinterCallback
    from transformers.utils import logging

    from . import EnsembleRewardConfig, EnsembleRewardModel, EnsembleRewardTrainer

    disable_progress_bars()
    logging.disable_progress_bar()
    design = world.design
    count = design.pairs + design.calibration
    ids, _ = _sample(policy, tokenizer, 2 * count, 1_000_000 + seed)
    gold, texts = gold_of(ids).view(2, count), tokenizer.batch_decode(ids)
    rows = Dataset.from_list([
        {"prompt": PROMPT, "chosen": a if first else b, "rejected": b if first else a}
        for a, b, first in zip(texts[:count], texts[count:], (gold[0] > gold[1]).tolist(), strict=True)
    ])  # fmt: skip
    train, calibration = rows.select(range(design.pairs)), rows.select(range(design.pairs, count))
    model = EnsembleRewardModel.from_base(_backbone(seed, 0, design, tokenizer), seed=seed, num_members=design.members)
    model.backbones = nn.ModuleList(_backbone(seed, k, design, tokenizer) for k in range(design.members))
    with tempfile.TemporaryDirectory() as folder:
        args = EnsembleRewardConfig(
            folder, num_members=design.members, label_noise=world.noise, label_noise_seed=seed, seed=seed,
            num_train_epochs=design.epochs, learning_rate=design.learning_rate, lr_scheduler_type="constant",
            per_device_train_batch_size=design.batch_size, per_device_eval_batch_size=256, **_QUIET,
        )  # fmt: skip
        trainer = EnsembleRewardTrainer(
            model, args=args, train_dataset=train, eval_dataset=calibration, calibration_dataset=calibration,
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        accuracy = float(trainer.evaluate()["eval_accuracy"])
    return trainer.ensemble, accuracy


def _backbone(seed: int, member: int, design: evidence.Settings, tokenizer: Any) -> Any:
    """The backbone of ``evidence.py`` with embeddings, 0 at first, for the special tokens."""
    import torch
    from torch import nn

    model = evidence._backbone(seed, member, design)
    weight = model.embed.weight.detach()
    more = weight.new_zeros(len(tokenizer) - len(weight), weight.shape[1])
    model.embed = nn.Embedding.from_pretrained(torch.cat([weight, more]), freeze=False)
    model.config.vocab_size, model.config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    return model


_QUIET: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
    "logging_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def _optimise(
    arm: str, seed: int, settings: Settings, made: _Made, report: Any
) -> tuple[list[dict[str, float]], float]:
    """trl's trainer on the arm's reward; what was seen before, on the way and at the end, and the seconds of training."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    rl, how = RUNS[arm]
    config, cls = (GRPOConfig, GRPOTrainer) if rl == "grpo" else (RLOOConfig, RLOOTrainer)
    reward, every = made.reward(how), max(1, settings.steps // settings.looks)
    looks, looking = [made.look(made.base, reward, settings.answers)], 0.0

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            nonlocal looking
            if state.global_step % every == 0 or state.global_step == settings.steps:
                start = time.monotonic()
                looks.append(made.look(model, reward, settings.answers))
                looking += time.monotonic() - start

    with tempfile.TemporaryDirectory() as folder:
        made.base.save_pretrained(folder)  # the trainers load the policy, and their reference model, from a folder
        args = config(
            output_dir=folder, max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
            num_generations=settings.generations, max_completion_length=LENGTH, learning_rate=settings.rates[arm],
            beta=settings.betas[arm], lr_scheduler_type="linear", seed=seed,
            generation_kwargs={"suppress_tokens": list(range(TOKENS, TOKENS + len(SPECIAL)))}, **_QUIET,
        )  # fmt: skip
        trainer = cls(
            folder, reward_funcs=reward, args=args, processing_class=made.tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [PROMPT] * settings.batch_size}),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Look())
        trainer.add_callback(trainer_progress(report))
        start = time.monotonic()
        trainer.train()
    return looks, time.monotonic() - start - looking


def judge(samples: Any, settings: Settings) -> list[Verdict]:
    """The verdict on every ensemble under either algorithm, against one reward model under the same.

    Void unless the policy learnt what the one reward model rewards: the whole interval of its rise above 0.
    """
    found = []
    for arm in JUDGED:
        rl = RUNS[arm][0]
        own, single = samples[arm], samples[f"{rl}_single"]
        rise, void = interval(single["gain"]), None
        if rise.mean <= 0 or (rise.n > 1 and rise.low <= 0):
            void = (
                f"{rl.upper()} did not raise the one reward model's score (by {rise.mean:.2f}, interval {rise.low:.2f} to "
                f"{rise.high:.2f}), so there is no optimisation to compare"
            )
        checks = [
            at_least("gold of the final policy, less one reward model's", paired(own["gold"], single["gold"]), 0.0),
            at_most("fall of gold from its peak, less one reward model's", paired(own["fall"], single["fall"]), 0.0),
        ]
        found.append(verdict(arm, checks, void))
    return found


METRICS = (
    Metric("gold", "gold at the end", "number", "of the final policy, in SD over the first policy's answers"),
    Metric("peak", "gold at its highest", "number", "over the policies that were measured on the way"),
    Metric("fall", "fall from the peak", "number", "peak less end: over-optimisation"),
    Metric("proxy", "proxy at the end", "number", "the reward that was optimised, members standardised"),
    Metric("gain", "rise of the proxy", "number", "end less start", detail=True),
    Metric("kl", "KL", "number", "of the final policy to the first, nats per answer"),
    Metric("rare", "rare tokens", "share", "of the final policy's tokens", detail=True),
    Metric("accuracy", "accuracy", "share", "of members on held-out pairs labelled by gold", detail=True),
    Metric("seconds", "time", "s", "of RL on one thread, without measuring", detail=True),
)

EXPERIMENT = Experiment(
    method="reward_ensemble",
    claim="grpo",
    title="GRPO and RLOO on one reward model and on five",
    statement=(
        "Tested claim: with 25 % label noise a policy optimised for the mean or WCO of five reward models ends, at equal "
        "steps, with at least the gold of one optimised for one of them, and its gold falls no farther from its peak."
    ),
    arms=ARMS,
    metrics=METRICS,
    chart=("kl", ("gold", "peak")),
    settings=SETTINGS,
    smoke_settings=dataclasses.replace(
        SETTINGS,
        world=World(design=dataclasses.replace(evidence.SETTINGS, pairs=64, calibration=32, epochs=1), sft_steps=20),
        steps=4,
        looks=2,
        answers=64,
    ),
    run=run_arm,
    judge=judge,
    steps=SETTINGS.steps,
    tries=(len(RATES) + len(BETAS) - 1) * len(TUNING_SEEDS),
    tuning_seeds=TUNING_SEEDS,
    notes=(
        "Synthetic: gold is a formula over 8 tokens, the one of less-overoptimisation; there is one prompt. The policy is "
        "a Llama of 0.1 million parameters, the reward models are embedding sums with one hidden layer, trained by "
        "EnsembleRewardTrainer on the policy's own answers. It shows the mechanism, not its size elsewhere.",
        "trl's GRPOTrainer and RLOOTrainer as they are, with the same steps, answers per step and linear decay. All arms "
        "of a seed start from one policy and use the same trained members; the single model is the first of them, "
        "standardised as it is in the ensemble, so that RLOO's advantages have one scale.",
        "Each arm's learning rate, then its KL weight, was chosen with the same grids, number of tries and other seeds: "
        + CRITERION
        + ". To choose by gold is more than a user could do; it lets one reward model stop short of what harms it, so "
        "less is left for the ensembles to win.",
        "Design, sizes and grids were settled with a few runs on seed 99; the checks and their bounds were written after "
        "those and before the tuning. Differences are paired by seed. A loss stands here as it came out.",
        "On the tuning seeds most policies ended on one answer or a few (a KL of 20 nats and more): gold at the end is the "
        "gold of those and differs much by seed.",
    ),
    caption="Up is better: gold of the final policy, and at its highest, against how far the policy went.",
)


def tune(workers: int = 2) -> dict[str, Any]:
    """Every arm at every rate without KL, then at its best rate with every KL weight; the table as plain data."""
    rows = tries("rate", {}, TUNING_SEEDS, workers)
    rates = choose(rows, "rate")
    more = tries("beta", rates, TUNING_SEEDS, workers)
    return table(rows, more)


def tries(what: str, rates: dict[str, float], seeds: Sequence[int], workers: int) -> list[Row]:
    """The tries of the rates, or of the KL weights above 0 at chosen rates; only the end is looked at."""
    from hfgen_plugins.trainers.reward_ensemble import evidence_grpo  # by its own name: workers look it up

    def settings(arm: str, value: float) -> Settings:
        rate, beta = (value, BETAS[0]) if what == "rate" else (rates[arm], value)
        return dataclasses.replace(evidence_grpo.SETTINGS, rates={arm: rate}, betas={arm: beta}, looks=1)

    grid = RATES if what == "rate" else BETAS[1:]
    return try_grid(evidence_grpo.run_arm, ARMS[1:], grid, seeds, settings, workers)


def choose(rows: Sequence[Row], what: str, first: Sequence[Row] = ()) -> dict[str, float]:
    """By arm, what `CRITERION` picks: a rate, or a KL weight (0 stands for `first`, the tries of the rates)."""
    if what == "beta":
        rates = choose(first, "rate")
        rows = [*rows, *({**row, "rate": BETAS[0]} for row in first if row["rate"] == rates[row["arm"]])]
    return {arm: best_rate([row for row in rows if row["arm"] == arm], ("gold",)) for arm in RUNS}


def table(rows: list[Row], more: list[Row]) -> dict[str, Any]:
    """The content of ``tuning-grpo.json``."""
    fixed = dataclasses.asdict(dataclasses.replace(SETTINGS, looks=1))
    del fixed["rates"], fixed["betas"]
    return {
        "format": 1, "criterion": CRITERION, "grid": list(RATES), "betas": list(BETAS), "seeds": list(TUNING_SEEDS),
        "settings": fixed, "chosen": choose(rows, "rate"), "chosen_betas": choose(more, "beta", rows), "runs": rows,
        "runs_betas": more,
    }  # fmt: skip


if __name__ == "__main__":
    tuning.main(tune, TUNING_FILE)
