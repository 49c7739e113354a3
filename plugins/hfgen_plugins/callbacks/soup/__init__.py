"""Model soup of one run: the average of its checkpoints, gated by a held-out loss."""

import lazy_loader

from hfgen.card import MethodCard, Paper

CARD = MethodCard(
    name="soup",
    kind="callbacks",
    summary="Averages checkpoints as the run goes (greedy, uniform, EMA), never worse than the best on the gate set.",
    target="hfgen_plugins.callbacks.soup.soup:SoupCallback",
    exports=("SoupCallback",),
    paper=Paper(
        title="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
        "inference time",
        id="arXiv:2203.05482",
        year=2022,
    ),
    needs=(
        "the user's own evaluations with labels (eval_strategy other than 'no'): each makes a member, its set is the gate",
        "one float32 copy of the trained parameters in main memory and in every checkpoint (two but for 'greedy')",
        "a classifier or language model: a forward that gives logits, integer labels",
    ),
    conflicts=(
        "FSDP2 and DeepSpeed: refused, sharded weights are not averaged",
        "BatchNorm that is trained: refused, running statistics cannot be averaged",
        "AdaLoRA, and adapters whose masks or indices move while they are trained: refused, one entry is not the same "
        "weight in two members",
    ),
    defaults=(
        "greedy: the paper's method of choice; decay 0.8 per member and 256 gate rows: ours. The gate is the loss (nats "
        "per label), the paper's is accuracy. From our method sheet (B1)"
    ),
    deviations=(
        "members are checkpoints of one run in the order of time; the paper takes the last ones of many runs and sorts "
        "them by accuracy",
        "greedy keeps the best of three at each member: the soup, the soup with it, and it alone; so it is never worse "
        "than the best member on the gate rows without going back",
        "of adapters of several factors (LoRA) the factors are averaged, not their products; the gate decides",
    ),
    sources="none",
    claims=(),
    example="hfgen_plugins.callbacks.soup.soup:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"soup": ["SoupCallback"]})
