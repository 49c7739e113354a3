"""Paraphraser `self`: the model rewrites the gold answer in its own words."""

import lazy_loader

from hfgen.card import MethodCard

CARD = MethodCard(
    name="self",
    kind="paraphrasers",
    summary="Asks the model itself, by instruction, to rewrite the gold answer in its own words.",
    target="hfgen_plugins.paraphrasers.self_rewrite.rewrite:SelfRewrite",
    exports=("SelfRewrite",),
    needs=("a model that follows instructions; a tiny or base model cannot: give it a callable",),
    defaults="our wording: the S3FT paper's prompt was not re-read and no code is released",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"rewrite": ["SelfRewrite"]})
