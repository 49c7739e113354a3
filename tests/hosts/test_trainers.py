"""Adapters in the hosts' own trainers: trl's SFT, DPO and Reward with peft_config=, Trainer's resume, diffusers' UNet."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.adapters import IncreLoraConfig, IntrinsicConfig, LoLDUConfig, SaraConfig, SomaConfig, SVFitConfig
from hfgen.quantizers import EasyQuantConfig

SIZES = {
    SVFitConfig: {"r": 4}, LoLDUConfig: {"r": 4}, SomaConfig: {"r": 4}, SaraConfig: {"density": 0.1},
    IncreLoraConfig: {"target_r": 2}, IntrinsicConfig: {"d": 20},
}  # fmt: skip
EACH = pytest.mark.parametrize("config_cls", SIZES)
COMMON = {
    "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip
R = sandbox.tasks.R
ROWS = [{"prompt": p, "completion": R.gold(p)} for p in R.prompts[:8]]
PAIRS = [{"prompt": p, "chosen": R.gold(p), "rejected": R.gold(p)[::-1]} for p in R.prompts[:8]]


def trainer_of(kind, config, folder, **changes):
    shared = {"processing_class": sandbox.load_tokenizer(), "peft_config": config}
    arguments = {"output_dir": str(folder), **COMMON, **changes}
    if kind == "sft":
        data = Dataset.from_list(ROWS)
        return SFTTrainer(sandbox.load_model(), args=SFTConfig(**arguments), train_dataset=data, **shared)
    data = Dataset.from_list(PAIRS)
    if kind == "dpo":
        return DPOTrainer(sandbox.load_model(), args=DPOConfig(**arguments), train_dataset=data, **shared)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(str(sandbox.path()), num_labels=1)
    return RewardTrainer(model, args=RewardConfig(**arguments), train_dataset=data, **shared)


@EACH
@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_trl(config_cls, kind, tmp_path):
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    heads = ["score"] if kind == "reward" else None
    config = config_cls(target_modules=["q_proj", "v_proj"], task_type=task, modules_to_save=heads, **SIZES[config_cls])
    trainer = trainer_of(kind, config, tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    prefix = trainer.model.base_model.prefix
    assert moved and all(prefix in n or "score" in n for n in moved), moved
    trainer.save_model(str(tmp_path / "saved"))
    base = (
        LlamaForSequenceClassification.from_pretrained(str(sandbox.path()), num_labels=1)
        if kind == "reward"
        else sandbox.load_model()
    )
    again = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


@pytest.mark.parametrize(
    ("config_cls", "options"),
    [(c, o) for c in (SVFitConfig, LoLDUConfig) for o in ({}, {"decay_to_init": True, "save_factors": True})]
    + [
        (SomaConfig, {}),
        (SaraConfig, {"progressive_at": 2}),
        (IncreLoraConfig, {"orth_reg": 0.3}),
        (IntrinsicConfig, {}),
    ],
)
def test_resume_is_bit_equal(config_cls, options, tmp_path):
    """Stopped after 2 of 4 steps and resumed in a new trainer: the same weights as the run that went through."""
    ids = torch.randint(3, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})

    def build(folder):
        torch.manual_seed(0)
        targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        config = config_cls(**targets, **SIZES[config_cls], **options)
        args = TrainingArguments(str(folder), save_steps=1, weight_decay=0.1, **COMMON)
        return Trainer(get_peft_model(sandbox.load_model(), config), args, train_dataset=rows)

    whole = build(tmp_path / "whole")
    whole.train()
    first = build(tmp_path / "cut")
    first.add_callback(Stop())
    first.train()
    assert first.state.global_step == 2
    second = build(tmp_path / "cut")
    second.train(resume_from_checkpoint=True)
    ends = [{n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (whole, second)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())


@pytest.mark.parametrize("kind", ["lora", "svfit", "loldu"])
def test_resume_on_a_quantised_base_is_bit_equal(kind, tmp_path):
    """EasyQuant 4 bit below: the run stopped after 2 of 4 steps ends as the one that went through, and its codes stay."""
    ids = torch.randint(3, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    config_cls = {"lora": LoraConfig, "svfit": SVFitConfig, "loldu": LoLDUConfig}[kind]

    def build(folder):
        torch.manual_seed(0)
        base = sandbox.load_model(quantization_config=EasyQuantConfig(bits=4))
        config = config_cls(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        args = TrainingArguments(str(folder), save_steps=1, weight_decay=0.1, **COMMON)
        return Trainer(get_peft_model(base, config), args, train_dataset=rows)

    whole = build(tmp_path / "whole")
    codes = {n: p.detach().clone() for n, p in whole.model.named_parameters() if not p.requires_grad}
    whole.train()
    first = build(tmp_path / "cut")
    first.add_callback(Stop())
    first.train()
    second = build(tmp_path / "cut")
    second.train(resume_from_checkpoint=True)
    assert first.state.global_step == 2 and second.state.global_step == 4
    ends = [dict(t.model.named_parameters()) for t in (whole, second)]
    assert any(p.requires_grad for p in ends[0].values())
    assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())
    assert all(torch.equal(p, ends[0][n]) for n, p in codes.items())


@EACH
def test_diffusers_unet(config_cls, tmp_path):
    """add_adapter / disable / enable, and peft's own save and load (diffusers' loader takes LoRA only)."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    shape = {
        "sample_size": 8, "in_channels": 2, "out_channels": 2, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 8, "attention_head_dim": 2,
    }  # fmt: skip
    unet = diffusers.UNet2DConditionModel(**shape).eval()
    plain = {k: v.clone() for k, v in unet.state_dict().items()}
    x, t, c = torch.randn(1, 2, 8, 8), torch.tensor([3]), torch.randn(1, 4, 8)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]

    def out(model):
        with torch.no_grad():
            return model(x, t, c).sample

    before = out(unet)
    options = {"target_modules": targets, "init_weights": False, **SIZES[config_cls]}
    if config_cls is IntrinsicConfig:  # state of its own on the tuner, which a host without a tuner cannot hold
        with pytest.raises(ValueError, match="get_peft_model"):
            unet.add_adapter(config_cls(**options))
    else:
        unet.add_adapter(config_cls(**options))
        on = out(unet)
        assert not torch.allclose(on, before, atol=1e-4)
        unet.disable_adapters()
        assert torch.equal(out(unet), before)
        unet.enable_adapters()
        assert torch.equal(out(unet), on)

    fresh = diffusers.UNet2DConditionModel(**shape).eval()
    fresh.load_state_dict(plain)
    wrapped = get_peft_model(fresh, config_cls(**options)).eval()
    wrapped.save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel(**shape).eval()
    again.load_state_dict(plain)
    loaded = PeftModel.from_pretrained(again, tmp_path).eval()
    assert torch.equal(out(loaded), out(wrapped))


@pytest.mark.parametrize(
    ("config_cls", "options"), [(SVFitConfig, {}), (LoLDUConfig, {}), (LoLDUConfig, {"train_scale": True})]
)
def test_sft_on_a_bitsandbytes_model(config_cls, options, tmp_path):
    """trl casts what trains on such a model to bfloat16; a rounded diagonal would not start at the base."""
    pytest.importorskip("bitsandbytes")

    def run(folder, resume=None, steps=4):
        model = sandbox.load_model(quantization_config=BitsAndBytesConfig(load_in_4bit=True))
        config = config_cls(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        args = SFTConfig(str(folder), **{**COMMON, "max_steps": steps}, save_strategy="steps", save_steps=2)
        trainer = SFTTrainer(
            model, args=args, train_dataset=Dataset.from_list(ROWS), peft_config=config,
            processing_class=sandbox.load_tokenizer(),
        )  # fmt: skip
        assert any(p.dtype == torch.bfloat16 for p in trainer.model.parameters() if p.requires_grad)
        if resume is None:
            ids = torch.arange(3, 20)[None]
            with torch.no_grad():
                on = trainer.model.train()(input_ids=ids).logits
                with trainer.model.disable_adapter():
                    assert torch.equal(on, trainer.model(input_ids=ids).logits)
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole")
    assert {p.dtype for p in whole.values()} == {torch.float32}
    resumed = run(tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(p, resumed[n]) for n, p in whole.items())
