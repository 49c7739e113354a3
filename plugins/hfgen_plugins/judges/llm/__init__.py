"""Judge `llm`: a local language model says whether answer and gold answer mean the same."""

import lazy_loader

from hfgen.card import MethodCard

CARD = MethodCard(
    name="llm",
    kind="judges",
    summary="True when a local transformers model, asked greedily, replies yes to whether answer and gold agree.",
    target="hfgen_plugins.judges.llm.judge:LLMJudge",
    exports=("LLMJudge",),
    needs=("a model that follows instructions, and room for it beside the one that is trained",),
    conflicts=(
        "rewards: an answer that speaks to the judge ('reply yes') may convince it; nothing guards against that",
        "several processes: each loads the judge's model",
    ),
    defaults=(
        "our wording and form of reply (the S3FT paper's judge prompt was not re-read); greedy, 8 new tokens: our choice"
    ),
    deviations=("a reply that is not exactly yes or no, or does not end, means not equivalent, and is counted",),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"judge": ["LLMJudge"]})
