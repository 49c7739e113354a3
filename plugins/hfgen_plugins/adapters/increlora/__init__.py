"""IncreLoRA: low-rank products whose ranks grow where they matter, until a budget is spent."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="increlora",
    kind="adapters",
    summary="LoRA that starts with rank 1 everywhere and gives rank to the modules that need it, up to a budget.",
    target="hfgen_plugins.adapters.increlora.increlora:IncreLoraConfig",
    exports=("IncreLoraConfig",),
    paper=Paper(
        "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
        "arXiv:2308.12043",
        2023,
    ),
    needs=(
        "Linear or Conv1D targets (quantised ones through peft's backends, EasyQuant)",
        "a torch.optim.Optimizer whose state has the parameters' shape (AdamW, SGD, ...): torch's step hooks; another one "
        "is refused",
        "transformers' Trainer, which is found by itself, or init_warmup, incre_interval and top_h: without either the "
        "ranks stay as they are, with a warning",
        "under DDP the default process group; DDP's buckets are laid out anew at each allocation (as its unpickling does)",
    ),
    conflicts=(
        "FSDP and DeepSpeed ZeRO: the parameters change their shapes (refused)",
        "optimizers with factored or 8-bit states (refused at the first step)",
        "PeftMixedModel (closed to third parties); nn.MultiheadAttention targets",
        "torch.compile: a graph break in the steps that are scored, and a compilation per allocation",
    ),
    defaults=(
        "init_r, target_r, incre_rank, beta1, beta2, lora_alpha, orth_reg, advance_learn and the scale are the authors'; "
        "warmup_steps = incre_interval = init_warmup as in their scripts (1000, top_h 2 for MNLI). A hundredth of the run "
        "as the interval, half of it to spend the budget, and score_window=64 are ours. lora_dropout 0 (theirs 0 to 0.3)."
    ),
    deviations=(
        "dW is never made: forward by factors, the score in blocks of rows, in score_window steps before an allocation "
        "(None = every step, theirs)",
        "micro-batches: their scores are added (theirs: the last one's); processes: scores are averaged at every scored "
        "step, so that ranks and checkpoints agree (theirs differ by process)",
        "the last gains are cut to the budget, ties go by module name (theirs may pass the budget and then never end)",
        "a component's own learning rate and Adam bias correction act inside the fixed optimizer groups: equal to groups "
        "of their own under the host's linear schedule, in proportion under others",
        "weight decay of new components is that of their group; theirs too, but other options were the defaults",
        "the orthogonality gradient is added once per step, after clipping",
        "the reserve (E = 1e-5) takes part in training only: eval, merge and export are without it",
        "E of the first components starts at 0 and directions are drawn from a seed, alike on all processes",
    ),
    sources="FeiyuZhang98/IncreLoRA was read for the method sheet (which notes no licence); no code of it is used",
    claims=(
        Claim(
            "better-at-equal-budget",
            "More accurate than LoRA and AdaLoRA at an equal number of trained parameters (GLUE, DeBERTaV3-base).",
        ),
        Claim(
            "against-cousins",
            (
                "With the same sum of ranks it learns at least as much of a new task as LoRA and AdaLoRA and keeps "
                "about as much of the old."
            ),
            experiment="hfgen_plugins.adapters.increlora.evidence:EXPERIMENT",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"increlora": ["IncreLoraConfig"]})
