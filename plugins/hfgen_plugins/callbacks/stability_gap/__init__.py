"""The stability gap: accuracy on earlier tasks that falls when a task begins and comes back (De Lange et al. 2023)."""

import lazy_loader

from hfgen.card import MethodCard, Paper

CARD = MethodCard(
    name="stability_gap",
    kind="callbacks",
    summary="Follows accuracy on earlier tasks while later ones are trained: worst case, windowed forgetting, recovery.",
    target="hfgen_plugins.callbacks.stability_gap.stability_gap:StabilityGapCallback",
    exports=("StabilityGapCallback",),
    paper=Paper(
        title="Continual evaluation for lifelong learning: Identifying the stability gap",
        id="arXiv:2205.13452",
        year=2023,
    ),
    needs=(
        "a dictionary of evaluation sets, one per task, and the steps at which the tasks end",
        "by default an accuracy in the evaluations' metrics (compute_metrics, or SFTTrainer's mean_token_accuracy)",
        "every='auto' or a number: the attached trainer, and evaluation sets with a length and class labels",
    ),
    conflicts=(
        "a loss as metric: minima and falls are those of an accuracy",
        "FSDP 1 with every= a number or 'auto': refused, the callback forwards rows itself; FSDP 2 works",
    ),
    defaults=(
        "windows of 10 and 100 evaluations, learning-curve area over 10, up to 1000 rows per task: the authors', by our "
        "method sheet; the user's evaluations instead of every step, and a fall of 0.1 as a finding: ours, kept by the "
        "calibration on half of the corpus of labelled runs (EVIDENCE.md)"
    ),
    deviations=(
        "evaluation at every step only on request (every=1); every='auto' evaluates whenever its share of the time so far "
        "stays under a tenth, half of that outside the first 100 steps of a task",
        "a task's own evaluations begin with the one before its first step; windowed plasticity is the current task's",
        "depth and recovery (steps back to 95 % of the accuracy at the task's end) are ours",
    ),
    sources="mattdl/ContinualEvaluation (MIT), read for the method sheet",
    example="hfgen_plugins.callbacks.stability_gap.stability_gap:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"stability_gap": ["StabilityGapCallback"]})
