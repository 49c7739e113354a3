"""EvoPress (arXiv:2410.14649): an evolutionary search over per-layer bits, dropped blocks or sparsity at one budget."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="evopress",
    kind="searches",
    summary="Elitist evolutionary search of per-layer bits, dropped blocks or sparsity that diverge least at one budget.",
    target="hfgen_plugins.searches.evopress.search:evopress",
    exports=(
        "evopress",
        "evopress_depth",
        "evopress_sparsity",
        "additive_bits",
        "drop_layers",
        "prune_layers",
        "SearchResult",
        "Schedule",
        "Levels",
    ),
    paper=Paper("EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", "arXiv:2410.14649", 2025),
    needs=(
        "a causal language model in float, in memory, and calibration rows",
        "for bits: a level database (`Levels`) of a data-free quantizer, packed, 20 bits a weight for 2 to 6",
        "tokens: generations * sum over stages of candidates * tokens; 1.8e8 for the default, 9.8e6 for super-fast",
    ),
    conflicts=(
        "layers whose divergences add up: the integer program (additive_bits, AdaQuantConfig's average_bits) finds as good "
        "a plan or a better one for far fewer tokens; where all layers are alike, neither beats uniform bits by much",
        "small budgets: with 30 generations of 16 on the sandbox's model its fitness fell by 14 % and held-out answers got "
        "worse than with uniform bits (recipes/bench/results/quantizers.json); compare on held_out= rows",
        "groups of one layer: under group_rule='size' it never changes; levels with gaps (4, 8) trade only equal steps",
        "dropping only the attention or only the feed-forward part of a block: exported as zeros, which saves no bytes",
        "encoder-decoder models and models without logits per token",
    ),
    defaults=(
        "schedules, min(U(1,3), U(1,3)) flips and KL as the paper's released settings (method sheet); 64 initial points of "
        "2048 tokens are its depth search's, used for all"
    ),
    deviations=(
        "KL over the whole vocabulary (kl_topk=None), not the 10 likeliest tokens: candidates are measured batch by batch, "
        "so the model's logits are never kept",
        "a child as good as its parent does not replace it; fewer children are taken where the budget has no more",
        "random starting points are filled up to the budget; an average that is no level starts from them",
        "a flip trades equal steps only, so the budget is exact for levels with gaps as well",
        "the level database is of data-free quantizers; the paper's is GPTQ's, dense on disk",
        "sparsity levels are by magnitude, the paper's by SparseGPT",
    ),
    sources="none: from the paper and the method sheet, which was made with the released code in view",
    claims=(
        Claim(
            "planted-heterogeneity",
            "Where layers differ in sensitivity, the plan found diverges far less than uniform bits at the same average.",
            experiment="hfgen_plugins.searches.evopress.evidence:EXPERIMENT",
            paper_value="Llama-3-8B, 3 bit on average, WikiText2 perplexity: 7.49 against 12.19 uniform",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "search": ["evopress", "evopress_depth", "evopress_sparsity", "additive_bits", "SearchResult", "Levels"],
        "problems": ["drop_layers", "prune_layers"],
        "evolution": ["Schedule"],
    },
)
