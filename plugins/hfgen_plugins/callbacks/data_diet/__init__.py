"""Data diet: how hard each training row is (EL2N, GraNd, forgetting events), as columns of the dataset."""

import lazy_loader

from hfgen.card import MethodCard, Paper

CARD = MethodCard(
    name="data_diet",
    kind="callbacks",
    summary="Scores training rows by EL2N, GraNd and forgetting events and gives the dataset with them as columns.",
    target="hfgen_plugins.callbacks.data_diet.data_diet:DataDietCallback",
    exports=("DataDietCallback",),
    paper=Paper(
        title="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
        id="arXiv:2107.07075",
        year=2021,
    ),
    needs=(
        "a training set with a length whose rows keep their place (no stream, no packing)",
        "the user's own evaluations (eval_strategy other than 'no'), or every=",
        "a classifier, token classifier or language model: a forward that gives logits, integer labels",
    ),
    conflicts=(
        "packing and padding-free collators: a batch row is no training row (refused)",
        "FSDP 1: refused, the callback forwards rows itself",
        "grand=True with FSDP2: per-row gradients of sharded weights (refused)",
    ),
    defaults=(
        "share 0.02: looks cost at most 2 % of the training's time, so they read a fixed, evenly spread sample; share=1.0 "
        "reads every row. right 0.9: ours. Definitions from our method sheet (2.5)"
    ),
    deviations=(
        "scores are means over the looks of one run; the paper averages over ten runs at a fixed early epoch",
        "rows are read in evaluation mode by their index between steps: a forgetting event is a row right at one look and "
        "wrong at the next, where Toneva et al. 2019 (arXiv:1812.05159) compare its presentations in training",
        "a row of a language model has the mean of its labelled tokens' EL2N, and is right when a share `right` of them is",
        "GraNd is of the parameters that are trained (of an adapter, its own), of the mean loss of the row",
    ),
    sources="none",
    claims=(),
    example="hfgen_plugins.callbacks.data_diet.data_diet:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"data_diet": ["DataDietCallback"]})
