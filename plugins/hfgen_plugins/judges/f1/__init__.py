"""Judge `f1`: enough words are shared with the gold answer, as reading comprehension is scored."""

import lazy_loader

from hfgen.card import MethodCard, Paper

CARD = MethodCard(
    name="f1",
    kind="judges",
    summary="True when the F1 of the words shared with the gold answer reaches a threshold (SQuAD's normalisation).",
    target="hfgen_plugins.judges.f1.judge:F1Judge",
    exports=("F1Judge", "token_f1"),
    paper=Paper(title="SQuAD: 100,000+ Questions for Machine Comprehension of Text", id="arXiv:1606.05250", year=2016),
    conflicts=("long answers: one wrong word, or a missing 'not', hardly changes the score",),
    defaults="threshold 0.8: our choice, since a wrong target costs more than falling back to gold; normalisation: SQuAD's",
    sources="none: the normalisation is written from memory of SQuAD's evaluation script",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"judge": ["F1Judge", "token_f1"]})
