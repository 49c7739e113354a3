"""The settings of a reward ensemble on top of trl's RewardConfig."""

from dataclasses import dataclass, field

from trl import RewardConfig

from hfgen.kit import checks

from .scoring import AGGREGATIONS

BACKENDS = ("separate", "lora", "heads")


@dataclass
class EnsembleRewardConfig(RewardConfig):
    """`RewardConfig` with the ensemble. Differs from it in learning rate (1e-5) and epochs (5).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields contradict each other.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Total number of training epochs to perform."})
    num_members: int = field(default=5, metadata={"help": "Members of the ensemble, K."})
    backend: str = field(
        default="separate",
        metadata={
            "help": "separate: K full models. lora: one frozen backbone, K adapters and heads. heads: one trained "
            "backbone, K heads on the same rows; its members disagree less off the training distribution."
        },
    )
    adapter_r: int = field(default=8, metadata={"help": "Rank of the adapters of backend lora."})
    adapter_alpha: float = field(default=16.0, metadata={"help": "They are scaled by adapter_alpha / adapter_r."})
    adapter_targets: list[str] | None = field(
        default=None, metadata={"help": "Linear layers that get adapters, by the end of their names; none given: all."}
    )
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Share of training pairs whose label is flipped: drawn by content, the same for all members."
        },
    )
    label_noise_seed: int = field(default=0, metadata={"help": "Seed of the flips."})
    score_l2: float = field(
        default=1e-3, metadata={"help": "Weight of (r_chosen^2 + r_rejected^2) / 2 in the loss; 0 turns it off."}
    )
    bootstrap: bool = field(
        default=False,
        metadata={"help": "Each member draws its rows with replacement (not the paper's). Not with backend heads."},
    )
    aggregation: str = field(default="mean", metadata={"help": "What the saved model returns: mean, wco or uwo."})
    uwo_lambda: float = field(
        default=0.5, metadata={"help": "Weight of the variance in uwo, in units of standardised reward."}
    )
    unbiased: bool = field(default=False, metadata={"help": "Variance with 1/(K-1); the paper has 1/K."})
    normalize: bool = field(
        default=True,
        metadata={"help": "Standardise each member on the calibration set; wco and uwo need it unless this is false."},
    )
    packing: bool = field(default=False, metadata={"help": "Not for rewards: true is refused."})

    def __post_init__(self) -> None:
        owner = "EnsembleRewardConfig"
        check_ensemble(owner, self)
        checks.integer(owner, "label_noise_seed", self.label_noise_seed, low=0)
        checks.number(owner, "label_noise", self.label_noise, high=1.0)
        checks.number(owner, "score_l2", self.score_l2)
        for name in ("label_noise", "score_l2"):
            if getattr(self, name) < 0:
                raise ValueError(f"{owner}.{name} is {getattr(self, name)}; give 0 or more")
        checks.boolean(owner, "bootstrap", self.bootstrap)
        if self.bootstrap and self.backend == "heads":
            raise ValueError(
                f"{owner}.bootstrap is true with backend 'heads', whose members share their rows; use lora"
            )
        if self.packing:
            raise ValueError(
                f"{owner}.packing is {self.packing!r}; a reward is read at the end of each answer, so answers cannot "
                "share a row: leave it out"
            )
        super().__post_init__()


def check_ensemble(owner: str, config: object) -> None:
    """Raise unless the fields of the ensemble, which the trainer's and the model's config share, are usable."""
    values = {name: getattr(config, name) for name in ENSEMBLE_FIELDS}
    checks.integer(owner, "num_members", values["num_members"], low=1)
    checks.one_of(owner, "backend", values["backend"], BACKENDS)
    checks.integer(owner, "adapter_r", values["adapter_r"], low=1)
    checks.number(owner, "adapter_alpha", values["adapter_alpha"], low=0.0)
    checks.names(owner, "adapter_targets", values["adapter_targets"])
    for name, default in (("adapter_r", 8), ("adapter_alpha", 16.0), ("adapter_targets", None)):
        if values["backend"] != "lora" and values[name] != default:
            raise ValueError(
                f"{owner}.{name} is {values[name]!r} with backend {values['backend']!r}, which has no adapters; leave it "
                "out, or set backend to lora"
            )
    checks.one_of(owner, "aggregation", values["aggregation"], AGGREGATIONS)
    checks.number(owner, "uwo_lambda", values["uwo_lambda"])
    if values["uwo_lambda"] < 0:
        raise ValueError(f"{owner}.uwo_lambda is {values['uwo_lambda']}; give 0 or more")
    for name in ("unbiased", "normalize"):
        checks.boolean(owner, name, values[name])
    if values["aggregation"] == "uwo" and values["num_members"] == 1:
        raise ValueError(
            f"{owner}.aggregation is 'uwo' with num_members 1, which has no variance; give at least 2 members, or mean"
        )


ENSEMBLE_FIELDS = (
    "num_members", "backend", "adapter_r", "adapter_alpha", "adapter_targets", "aggregation", "uwo_lambda", "unbiased",
    "normalize",
)  # fmt: skip
