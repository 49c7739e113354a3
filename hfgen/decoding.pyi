from typing import Any

from hfgen_plugins.decoding.best_of_n import BestOfNCurves as BestOfNCurves
from hfgen_plugins.decoding.best_of_n import BestOfNSampler as BestOfNSampler
from hfgen_plugins.decoding.best_of_n import BestOfNSamples as BestOfNSamples
from hfgen_plugins.decoding.best_of_n import best_of_n as best_of_n
from hfgen_plugins.decoding.best_of_n import best_of_n_curves as best_of_n_curves
from hfgen_plugins.decoding.best_of_n import best_of_n_kl as best_of_n_kl
from hfgen_plugins.decoding.best_of_n import expected_best_of_n as expected_best_of_n
from hfgen_plugins.decoding.best_of_n import plot_best_of_n as plot_best_of_n

def __getattr__(name: str) -> Any: ...  # a third party's
