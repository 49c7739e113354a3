from typing import Any

from hfgen_plugins.paraphrasers.self_rewrite import SelfRewrite as SelfRewrite

def __getattr__(name: str) -> Any: ...  # a third party's
