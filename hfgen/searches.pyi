from typing import Any

from hfgen_plugins.searches.evopress import Levels as Levels
from hfgen_plugins.searches.evopress import Schedule as Schedule
from hfgen_plugins.searches.evopress import SearchResult as SearchResult
from hfgen_plugins.searches.evopress import additive_bits as additive_bits
from hfgen_plugins.searches.evopress import drop_layers as drop_layers
from hfgen_plugins.searches.evopress import evopress as evopress
from hfgen_plugins.searches.evopress import evopress_depth as evopress_depth
from hfgen_plugins.searches.evopress import evopress_sparsity as evopress_sparsity
from hfgen_plugins.searches.evopress import prune_layers as prune_layers

def __getattr__(name: str) -> Any: ...  # a third party's
