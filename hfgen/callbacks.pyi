from typing import Any

from hfgen_plugins.callbacks.calibration import CalibrationCallback as CalibrationCallback
from hfgen_plugins.callbacks.data_diet import DataDietCallback as DataDietCallback
from hfgen_plugins.callbacks.forgetting import ForgettingCallback as ForgettingCallback
from hfgen_plugins.callbacks.gradual_pruning import GradualPruningCallback as GradualPruningCallback
from hfgen_plugins.callbacks.grokking import GrokkingCallback as GrokkingCallback
from hfgen_plugins.callbacks.hyperfit import HyperfitCallback as HyperfitCallback
from hfgen_plugins.callbacks.hyperfit import hyperfit_args as hyperfit_args
from hfgen_plugins.callbacks.instability import InstabilityCallback as InstabilityCallback
from hfgen_plugins.callbacks.learning_curve import LearningCurveCallback as LearningCurveCallback
from hfgen_plugins.callbacks.low_mantissa import LowMantissaCallback as LowMantissaCallback
from hfgen_plugins.callbacks.low_mantissa import loss_sharpness as loss_sharpness
from hfgen_plugins.callbacks.low_mantissa import round_mantissa as round_mantissa
from hfgen_plugins.callbacks.low_mantissa import simulate_mantissa as simulate_mantissa
from hfgen_plugins.callbacks.overfit_gap import OverfitGapCallback as OverfitGapCallback
from hfgen_plugins.callbacks.softmax_collapse import SoftmaxCollapseCallback as SoftmaxCollapseCallback
from hfgen_plugins.callbacks.soup import SoupCallback as SoupCallback
from hfgen_plugins.callbacks.stability_gap import StabilityGapCallback as StabilityGapCallback

def __getattr__(name: str) -> Any: ...  # a third party's
