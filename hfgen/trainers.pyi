from typing import Any

from hfgen_plugins.trainers.reward_ensemble import EnsembleReward as EnsembleReward
from hfgen_plugins.trainers.reward_ensemble import EnsembleRewardConfig as EnsembleRewardConfig
from hfgen_plugins.trainers.reward_ensemble import EnsembleRewardModel as EnsembleRewardModel
from hfgen_plugins.trainers.reward_ensemble import EnsembleRewardTrainer as EnsembleRewardTrainer
from hfgen_plugins.trainers.reward_ensemble import flip_labels as flip_labels
from hfgen_plugins.trainers.s3ft import S3FTConfig as S3FTConfig
from hfgen_plugins.trainers.s3ft import S3FTTrainer as S3FTTrainer
from hfgen_plugins.trainers.s3ft import build_s3ft_dataset as build_s3ft_dataset

def __getattr__(name: str) -> Any: ...  # a third party's
