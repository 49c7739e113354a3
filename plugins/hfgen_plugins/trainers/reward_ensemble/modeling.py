"""EnsembleRewardModel: K reward models as one PreTrainedModel in one folder, with one answer: mean, WCO or UWO.

A member is a decoder and a linear head on its last token, as transformers' `...ForSequenceClassification` with one
label; `member(k)` gives it back as that class. Importing this module registers model_type "reward_ensemble" with
transformers' AutoConfig and AutoModelForSequenceClassification.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from .config import check_ensemble
from .scoring import aggregate, stack_scores, standardize, variance

FORMAT = 1  # of the saved config and tensor names


class EnsembleRewardModelConfig(PreTrainedConfig):
    """What a saved ensemble says about itself.

    Args:
        base_config: The members' backbone: a config, or its dict.
        num_members: K.
        backend: separate, lora or heads; see EnsembleRewardConfig, as of the other fields of that name.
        calibration_mean: K means of raw scores over the answers of the calibration set; None: not calibrated.
        calibration_std: K standard deviations (1/(n-1)) there.
        pad_token_id: None takes the backbone's.

    Raises:
        TypeError, ValueError: a field that no ensemble can have.
    """

    model_type = "reward_ensemble"
    sub_configs = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: PreTrainedConfig | Mapping[str, Any] | None = None,
        num_members: int = 5,
        backend: str = "separate",
        adapter_r: int = 8,
        adapter_alpha: float = 16.0,
        adapter_targets: list[str] | None = None,
        aggregation: str = "mean",
        uwo_lambda: float = 0.5,
        unbiased: bool = False,
        normalize: bool = True,
        calibration_mean: list[float] | None = None,
        calibration_std: list[float] | None = None,
        ensemble_format: int = FORMAT,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if ensemble_format != FORMAT:
            raise ValueError(f"ensemble_format is {ensemble_format!r}, this hfgen reads {FORMAT}; upgrade hfgen")
        if isinstance(base_config, Mapping):
            options = dict(base_config)
            base_config = AutoConfig.for_model(options.pop("model_type"), **options)
        self.base_config: PreTrainedConfig | None = base_config
        self.num_members, self.backend = num_members, backend
        self.adapter_r, self.adapter_alpha, self.adapter_targets = adapter_r, adapter_alpha, adapter_targets
        self.aggregation, self.uwo_lambda, self.unbiased = aggregation, uwo_lambda, unbiased
        self.normalize, self.ensemble_format = normalize, ensemble_format
        self.calibration_mean, self.calibration_std = calibration_mean, calibration_std
        self.pad_token_id = getattr(base_config, "pad_token_id", None) if pad_token_id is None else pad_token_id
        check_ensemble(type(self).__name__, self)
        super().__init__(**{"num_labels": 1, **kwargs})


@dataclass
class EnsembleRewardOutput(ModelOutput):
    """Scores of N answers.

    Attributes:
        logits: (N, 1), the aggregated reward; None with `aggregate=False`.
        member_logits: (N, K), each member's raw score.
        variance: (N,), over members, of standardised scores where the ensemble standardises.
    """

    logits: Tensor | None = None
    member_logits: Tensor | None = None
    variance: Tensor | None = None


class MemberLinear(nn.Module):
    """A frozen linear layer with K low-rank updates: rows of member k get W x + (alpha / r) B_k A_k x.

    Takes (K * N, ..., in), the rows of member 0 first. All members go through in one pass: with peft's switch between
    adapters, gradient checkpointing (on by default in trl) would recompute every member with the last one's.
    """

    def __init__(self, base: nn.Linear, members: int, r: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        options: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        if not options["dtype"].is_floating_point:  # a quantised base
            options["dtype"] = torch.float32
        shapes = (r, base.in_features), (base.out_features, r)
        self.lora_A, self.lora_B = (
            nn.ParameterList(nn.Parameter(torch.zeros(shape, **options)) for _ in range(members)) for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.lora_A), -1, x.shape[-1])  # (K, N * ..., in)
        down = torch.bmm(rows.to(self.lora_A[0].dtype), torch.stack(list(self.lora_A)).transpose(1, 2))
        up = torch.bmm(down, torch.stack(list(self.lora_B)).transpose(1, 2))
        out: Tensor = self.base(x)
        return out + (self.scaling * up).view(out.shape).to(out.dtype)

    def update(self, k: int) -> Tensor:
        """Of member k: (out, in)."""
        return self.scaling * (self.lora_B[k] @ self.lora_A[k])


class EnsembleRewardModel(PreTrainedModel):
    """K reward models that answer as one.

    `forward(input_ids, attention_mask)` gives an `EnsembleRewardOutput`. It can stand in
    `GRPOTrainer(reward_funcs=model)`, but `EnsembleReward` scores texts as they were trained on (with their EOS).
    """

    config_class = EnsembleRewardModelConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EnsembleRewardModelConfig) -> None:
        super().__init__(config)
        if config.base_config is None:
            raise ValueError("EnsembleRewardModelConfig.base_config is None; give the config of the members' backbone")
        copies = config.num_members if config.backend == "separate" else 1
        self.sources: list[Callable[[], tuple[PreTrainedModel, Tensor]]] | None = None  # of a streamed ensemble
        self.backbones = nn.ModuleList(AutoModel.from_config(config.base_config) for _ in range(copies))
        width = config.base_config.get_text_config().hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(config.num_members))
        if config.backend == "lora":
            _put_adapters(self.backbones[0], config)
        self.post_init()

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_base(cls, base: PreTrainedModel, seed: int = 0, **options: Any) -> EnsembleRewardModel:
        """An untrained ensemble on the backbone of `base` (any decoder; its own head, if there is one, is not used).

        The backbone is used, not copied, but by members 1, 2, ... of backend separate.

        Args:
            base: The model.
            seed: Head (and adapter) k is drawn by seed + k.
            options: Fields of EnsembleRewardModelConfig.
        """
        backbone = base.base_model
        config = EnsembleRewardModelConfig(copy.deepcopy(backbone.config), **options)
        config._name_or_path = base.config._name_or_path
        copies = config.num_members - 1 if config.backend == "separate" else 0
        backbones = [backbone, *(copy.deepcopy(backbone) for _ in range(copies))]
        if config.backend == "lora":
            backbone.requires_grad_(False)
            _put_adapters(backbone, config)
        width, std = (
            backbone.config.get_text_config().hidden_size,
            getattr(backbone.config, "initializer_range", 0.02),
        )
        heads = []
        for k in range(config.num_members):
            generator = torch.Generator().manual_seed(seed + k)
            heads.append(torch.randn(width, generator=generator) * std)
            for layer in (m for m in backbone.modules() if isinstance(m, MemberLinear)):
                bound = 1 / math.sqrt(layer.base.in_features)  # peft's kaiming_uniform_(a=sqrt(5)) of A; B is 0
                drawn = torch.rand(layer.lora_A[k].shape, generator=generator) * 2 * bound - bound
                layer.lora_A[k].data.copy_(drawn)
        return cls._assemble(config, backbones, heads)

    @classmethod
    def from_members(
        cls, members: Sequence[str | Path | PreTrainedModel], *, streamed: bool = False, **options: Any
    ) -> EnsembleRewardModel:
        """An ensemble of K reward models that were trained elsewhere, by trl's RewardTrainer for instance.

        Args:
            members: Folders, hub ids or models: `...ForSequenceClassification` with one label and a linear `score`.
            streamed: Keep none of them: each is loaded when it scores and dropped after; needs folders or ids.
            options: Fields of EnsembleRewardModelConfig.

        Raises:
            TypeError: streamed members that are models, or a member without such a head.
            ValueError: no members, or members that differ in tokenizer or shape.
        """
        members = list(members)
        if not members:
            raise ValueError("members is empty; give at least one reward model")
        paths = [str(m) for m in members if isinstance(m, str | Path)]
        _check_tokenizers(paths)
        if streamed:
            if len(paths) < len(members):
                raise TypeError("streamed members are loaded when they score; give folders or hub ids, not models")
            configs = [AutoConfig.from_pretrained(p) for p in paths]
            _check_alike([_shape_of(c) for c in configs], paths)
            config = EnsembleRewardModelConfig(configs[0], **options, num_members=len(members))
            return cls._streamed(config, [_path_source(p) for p in paths])
        models = [load_member(str(m)) if isinstance(m, str | Path) else m for m in members]
        for m in models:
            _head(m)
        _check_alike(
            [_shape_of(m.config) for m in models],
            [m.config._name_or_path or f"member {k}" for k, m in enumerate(models)],
        )
        config = EnsembleRewardModelConfig(
            copy.deepcopy(models[0].base_model.config), **options, num_members=len(members)
        )
        config._name_or_path = models[0].config._name_or_path
        return cls._assemble(config, [m.base_model for m in models], [_head(m) for m in models])

    @classmethod
    def load_streamed(cls, folder: str | Path, **options: Any) -> EnsembleRewardModel:
        """A saved ensemble of backend separate that holds no member: each is read when it scores, and dropped after.

        The tensors are memory-mapped, so the peak is one member.

        Args:
            folder: Where `save_pretrained` wrote it.
            options: Fields of EnsembleRewardModelConfig that are to differ.

        Raises:
            ValueError: another backend, or no safetensors there.
        """
        config = EnsembleRewardModelConfig.from_pretrained(str(folder), **options)
        if config.backend != "separate":
            raise ValueError(
                f"backend is {config.backend!r}, whose members share one backbone; load it with from_pretrained"
            )
        members = range(config.num_members)
        return cls._streamed(config, [_folder_source(Path(folder), config.base_config, k) for k in members])

    @classmethod
    def _assemble(
        cls, config: EnsembleRewardModelConfig, backbones: list[PreTrainedModel], heads: list[Tensor]
    ) -> EnsembleRewardModel:
        with torch.device("meta"):  # the structure; every weight comes from the arguments
            model = cls(config)
        model.backbones = nn.ModuleList(backbones)
        for layer, weight in zip(model.heads, heads, strict=True):
            layer.weight = nn.Parameter(weight.detach().reshape(1, -1).to(backbones[0].device, backbones[0].dtype))
        model.config.dtype = backbones[0].dtype
        return model.train(backbones[0].training)

    @classmethod
    def _streamed(cls, config: EnsembleRewardModelConfig, sources: list[Any]) -> EnsembleRewardModel:
        with torch.device("meta"):
            model = cls(config)
        model.backbones, model.heads, model.sources = nn.ModuleList(), nn.ModuleList(), sources
        return model.eval()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        if self.sources is not None:
            raise ValueError("a streamed ensemble holds no weights to save; its members are where they were read from")
        return super().save_pretrained(*args, **kwargs)

    def member(self, k: int) -> PreTrainedModel:
        """Member k as a stock `...ForSequenceClassification`; of backend separate and heads it shares our weights.

        Raises:
            ValueError: no such member, or a streamed ensemble.
        """
        if self.sources is not None or not 0 <= k < len(self.heads):
            raise ValueError(f"member is {k!r}; give 0 to {len(self.heads) - 1}, of an ensemble that is not streamed")
        config = copy.deepcopy(self.config.base_config)
        config.num_labels, config.pad_token_id = 1, self.config.pad_token_id
        backbone = self.backbones[k if self.config.backend == "separate" else 0]
        if self.config.backend == "lora":
            backbone = _merged(backbone, k)
        with torch.device("meta"):
            model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
        setattr(model, model.base_model_prefix, backbone)
        model.score.weight = self.heads[k].weight
        return model.train(self.training)

    # --- scoring ----------------------------------------------------------------------------------------------------

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, aggregate: bool = True, **kwargs: Any
    ) -> EnsembleRewardOutput:
        """Scores of N answers.

        Args:
            input_ids: (N, T), which every member scores; or (K, N, T), a batch for each member, with aggregate=False.
            attention_mask: The same shape; an answer's score is read at its last attended token. None: what is not
                padding.
            aggregate: False gives member_logits only.

        Raises:
            ValueError: members on different answers cannot be aggregated, or WCO/UWO without calibration.
        """
        if aggregate and input_ids.ndim != 2:
            raise ValueError(
                f"input_ids has the shape {tuple(input_ids.shape)}: members on different answers have no common reward; "
                "give (answers, tokens), or aggregate=False"
            )
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        scores = self.member_scores([batch]) if self.sources is not None else self._scores(**batch)
        if not aggregate:
            return EnsembleRewardOutput(member_logits=scores)
        reward, spread = self.combine(scores)
        return EnsembleRewardOutput(logits=reward[:, None], member_logits=scores, variance=spread)

    def member_scores(self, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """Raw scores (N, K) of all answers in `batches` of forward's arguments; a streamed member is loaded once."""
        batches = list(batches)
        if self.sources is None:
            return torch.cat([self._scores(**b) for b in batches])
        columns = []
        for source in self.sources:
            backbone, head = source()
            backbone.to(batches[0]["input_ids"].device)
            head = head.to(batches[0]["input_ids"].device)
            columns.append(
                torch.cat([_float(_last_hidden(backbone, self.config.pad_token_id, **b) @ head) for b in batches])
            )
            del backbone, head
        return stack_scores(columns)

    def combine(
        self, scores: Tensor, aggregation: str | None = None, uwo_lambda: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(reward (N,), variance over members (N,)) of raw scores (N, K); None takes the config's.

        Raises:
            ValueError: WCO or UWO without calibration, unless `config.normalize` is false; UWO of one member.
        """
        config = self.config
        how = config.aggregation if aggregation is None else aggregation
        if config.normalize:
            if config.calibration_mean is not None:
                mean, std = (scores.new_tensor(v) for v in (config.calibration_mean, config.calibration_std))
                scores = standardize(scores, mean, std)
            elif how in ("wco", "uwo"):
                raise ValueError(
                    f"aggregation {how!r} compares members, and this ensemble has no calibration; call calibrate(), give "
                    "the trainer a calibration_dataset, or set normalize=False"
                )
        weight = config.uwo_lambda if uwo_lambda is None else uwo_lambda
        return aggregate(scores, how, weight, config.unbiased), variance(scores, config.unbiased)

    def calibrate(self, scores: Tensor) -> None:
        """Keep the mean and standard deviation of each member's raw scores (N, K) of a calibration set in the config.

        Raises:
            ValueError: another K, fewer than 2 answers, or a member whose scores are all equal or not finite.
        """
        if scores.ndim != 2 or scores.shape[1] != self.config.num_members or len(scores) < 2:
            raise ValueError(
                f"calibration scores have the shape {tuple(scores.shape)}; give 2 or more answers x "
                f"{self.config.num_members} members"
            )
        mean, std = scores.double().mean(0), scores.double().std(0)
        bad = [k for k, s in enumerate(std.tolist()) if not (math.isfinite(s) and s > 0)]
        if bad:
            raise ValueError(
                f"member {bad[0]} gives scores with standard deviation {std[bad[0]]} on the calibration set; give other "
                "answers, or train it"
            )
        self.config.calibration_mean, self.config.calibration_std = mean.tolist(), std.tolist()

    def _scores(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(N, K) of (N, T) or, a batch for each member, (K, N, T)."""
        if self.config.backend == "heads":
            if input_ids.ndim == 3:
                raise ValueError("members of backend 'heads' share one pass; give input_ids of shape (answers, tokens)")
            hidden = _last_hidden(self.backbones[0], self.config.pad_token_id, input_ids, attention_mask, **kwargs)
            return _float(torch.cat([head(hidden) for head in self.heads], dim=1))
        members = len(self.heads)
        ids, masks = (
            None if x is None else x if x.ndim == 3 else x.expand(members, *x.shape)
            for x in (input_ids, attention_mask)
        )
        assert ids is not None
        if self.config.backend == "lora":
            flat = (None if x is None else x.reshape(-1, x.shape[-1]) for x in (ids, masks))
            hidden = _last_hidden(self.backbones[0], self.config.pad_token_id, *flat, **kwargs).view(
                members, ids.shape[1], -1
            )
        else:
            parts = zip(self.backbones, ids, [None] * members if masks is None else masks, strict=True)
            hidden = torch.stack([_last_hidden(b, self.config.pad_token_id, i, m, **kwargs) for b, i, m in parts])
        return _float(stack_scores([head(h)[:, 0] for head, h in zip(self.heads, hidden, strict=True)]))


def _float(scores: Tensor) -> Tensor:
    """At least float32: half precision has 3 digits, and rewards are subtracted."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _last_hidden(
    backbone: nn.Module, pad_id: int | None, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Hidden state of the last attended token of every row: (N, T) -> (N, H). No logits of the vocabulary are made."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids) if pad_id is None else (input_ids != pad_id).long()
    kwargs.pop("use_cache", None)
    hidden = backbone(input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).last_hidden_state
    last = (attention_mask * torch.arange(input_ids.shape[1], device=input_ids.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]


# --- adapters -----------------------------------------------------------------------------------------------------


def _put_adapters(backbone: nn.Module, config: EnsembleRewardModelConfig) -> None:
    """Replace the target layers of `backbone` by MemberLinear."""
    wanted = config.adapter_targets
    ends = ("",) if wanted is None else tuple(f".{n}" for n in ([wanted] if isinstance(wanted, str) else wanted))
    found = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear) and f".{n}".endswith(ends)]
    if not found:
        raise ValueError(
            f"adapter_targets is {wanted!r}, which no linear layer of the model ends in; see model.named_modules()"
        )
    for name, module in found:
        backbone.set_submodule(name, MemberLinear(module, config.num_members, config.adapter_r, config.adapter_alpha))


def _merged(backbone: PreTrainedModel, k: int) -> PreTrainedModel:
    """A copy of `backbone` with the updates of member k added to the weights."""
    backbone = copy.deepcopy(backbone)
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, MemberLinear):
            layer.base.weight.data += layer.update(k).detach().to(layer.base.weight.dtype)
            backbone.set_submodule(name, layer.base.requires_grad_(True))
    return backbone.requires_grad_(True)


# --- members from elsewhere ---------------------------------------------------------------------------------------


def load_member(path: str) -> PreTrainedModel:
    """A stock reward model from safetensors only; no code of its own is run."""
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, use_safetensors=True)


def _head(member: PreTrainedModel) -> Tensor:
    """Weight (H,) of the linear head of a stock reward model."""
    score = getattr(member, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1 or score.bias is not None:
        raise TypeError(
            f"a member is {type(member).__name__}; give a ...ForSequenceClassification with num_labels 1 whose head is a "
            "linear `score` without bias, as decoders have"
        )
    return score.weight[0]


def _path_source(path: str) -> Callable[[], tuple[PreTrainedModel, Tensor]]:
    def load() -> tuple[PreTrainedModel, Tensor]:
        model = load_member(path).eval().requires_grad_(False)
        return model.base_model, _head(model)

    return load


def _folder_source(folder: Path, base: PreTrainedConfig, k: int) -> Callable[[], tuple[PreTrainedModel, Tensor]]:
    def load() -> tuple[PreTrainedModel, Tensor]:
        head = _read(folder, f"heads.{k}.")["weight"][0]
        cls, config = MODEL_MAPPING[type(base)], copy.deepcopy(base)
        backbone = cls.from_pretrained(
            None, config=config, state_dict=_read(folder, f"backbones.{k}."), dtype=head.dtype
        )
        return backbone.eval().requires_grad_(False), head

    return load


def _read(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Memory-mapped tensors of a saved model whose names start with `prefix`, without it."""
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    if not all((folder / name).is_file() for name in files):
        raise ValueError(f"{folder} has no model.safetensors; give a folder that save_pretrained wrote")
    found: dict[str, Tensor] = {}
    for name in sorted(files):
        with safe_open(folder / name, "pt") as file:
            found |= {k[len(prefix) :]: file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
    return found


def _shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    text = config.get_text_config()
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {name: getattr(text, name, None) for name in (*names, "pad_token_id")}


def _check_alike(shapes: list[dict[str, Any]], names: list[str]) -> None:
    for shape, name in zip(shapes, names, strict=True):
        different = [key for key in shape if shape[key] != shapes[0][key]]
        if different:
            key = different[0]
            raise ValueError(
                f"member {name!r} has {key} {shape[key]!r}, member {names[0]!r} has {shapes[0][key]!r}; give members of "
                "one architecture and tokenizer"
            )


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides how a text is tokenised and where it is cut."""
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return [tokenizer.get_vocab(), special, tokenizer.chat_template, tokenizer.truncation_side]


def _check_tokenizers(paths: list[str]) -> None:
    """All members that bring a tokenizer must bring the same: they have to read the same tokens of an answer."""
    first: tuple[str, list[Any]] | None = None
    for path in paths:
        if Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file():
            continue
        identity = tokenizer_identity(AutoTokenizer.from_pretrained(path))
        first = first or (path, identity)
        if identity != first[1]:
            parts = ("vocabularies", "special tokens", "chat templates", "truncation sides")
            which = next(p for p, a, b in zip(parts, identity, first[1], strict=True) if a != b)
            raise ValueError(
                f"members {first[0]!r} and {path!r} have different {which}; they must read the same tokens: train them "
                "with one tokenizer"
            )


AutoConfig.register(EnsembleRewardModelConfig.model_type, EnsembleRewardModelConfig, exist_ok=True)
AutoModelForSequenceClassification.register(EnsembleRewardModelConfig, EnsembleRewardModel, exist_ok=True)
