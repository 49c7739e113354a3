from typing import Any

from hfgen_plugins.trainers.s3ft import S3FTConfig as S3FTConfig
from hfgen_plugins.trainers.s3ft import S3FTTrainer as S3FTTrainer
from hfgen_plugins.trainers.s3ft import build_s3ft_dataset as build_s3ft_dataset

def __getattr__(name: str) -> Any: ...  # a third party's
