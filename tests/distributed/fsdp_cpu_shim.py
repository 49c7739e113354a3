"""TEST-ONLY: real FSDP2 on CPU processes. accelerate upgrades MULTI_<accelerator> to FSDP, but never MULTI_CPU."""

import os
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

# What `accelerate launch` sets from an FSDP2 config file.
ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}


@contextmanager
def fsdp2():
    """Trainers made inside are FSDP2; those made before and after are DDP."""
    original, before = PartialState.__init__, dict(os.environ)

    def patched(self, cpu=False, **kwargs):
        original(self, cpu, **kwargs)
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState.__init__ = patched
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        PartialState.__init__ = original
        for name in ENVIRONMENT:
            os.environ.pop(name, None)
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
