"""Best-of-n: the answer a reward likes best of n, what that does to a gold reward as n grows, and where to stop.

The setting is that of Coste et al., arXiv 2310.02743 (the proxy is a reward model or an ensemble of them, n grows until
it is over-optimised); the sampler replaces the BestOfNSampler that trl removed.
"""

import lazy_loader

from hfgen.card import MethodCard, Paper

CARD = MethodCard(
    name="best_of_n",
    kind="decoding",
    summary="The best of n sampled answers by a reward, and unbiased gold and proxy curves over n with advice to stop.",
    target="hfgen_plugins.decoding.best_of_n.sampler:best_of_n",
    exports=(
        "best_of_n",
        "BestOfNSampler",
        "BestOfNSamples",
        "expected_best_of_n",
        "best_of_n_kl",
        "best_of_n_curves",
        "BestOfNCurves",
        "plot_best_of_n",
    ),
    paper=Paper(title="Reward Model Ensembles Help Mitigate Overoptimization", id="arXiv:2310.02743", year=2023),
    needs=(
        "a reward: a trl reward function, a function of texts, or a sequence classification model with one label",
        "sampling: do_sample=True in model.generate",
    ),
    conflicts=(
        "encoder-decoder models, beam search, num_return_sequences and streamer in model.generate(custom_generate=...)",
        "generate under DeepSpeed ZeRO-3 or FSDP: transformers does not hand synced_gpus to a custom_generate callable",
        "generate's tokenizer= and stop_strings=: transformers does not hand them to a custom_generate callable",
    ),
    defaults=(
        "n=4 as in trl's removed BestOfNSampler; temperature 1, top_p 1, 256 new tokens as the paper's released "
        "settings (method sheet); penalty 0.5 on the members' variance is the paper's UWO weight for best-of-n"
    ),
    deviations=(
        "answers with equal proxy scores share their rank's weight, so that the estimate does not depend on their order",
        "log n - (n - 1)/n is called an upper bound of the KL divergence, which it is (arXiv:2401.01879), not its value",
        "where the gold reward turns down is tested on prompts other than those that chose the peak",
    ),
    sources=(
        "trl 0.x BestOfNSampler (Apache-2.0), read for its argument names only; the estimator is that of OpenAI, "
        "'Measuring Goodhart's law' (2022), from its text"
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "sampler": ["best_of_n", "BestOfNSampler", "BestOfNSamples"],
        "estimator": ["expected_best_of_n", "best_of_n_kl"],
        "curves": ["best_of_n_curves", "BestOfNCurves", "plot_best_of_n"],
    },
)
