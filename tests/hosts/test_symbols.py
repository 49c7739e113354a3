"""Every upstream symbol we lean on, by name: a host release that moves one turns this red before a user sees it."""

import importlib
import inspect

import pytest

# module -> names; a trailing () says which parameters we pass
SYMBOLS = {
    "peft": ["PeftConfig", "PeftModel", "get_peft_model", "convert_to_lora"],
    "peft.mapping": ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"],
    "peft.tuners._buffer_dict": ["BufferDict"],
    "peft.tuners.tuners_utils": ["BaseTuner", "BaseTunerLayer", "_get_in_out_features", "_maybe_include_all_linear_layers", "check_adapters_to_merge"],
    "peft.utils": [
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "TaskType", "get_quantization_kwargs",
        "quantization_extra_repr", "register_peft_method", "resolve_quantization_backend",
    ],
    "peft.utils.constants": ["DUMMY_TARGET_MODULES", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME"],
    "peft.utils.integrations": ["gather_params_ctx"],
    "peft.utils.peft_types": ["PeftType"],
    "transformers.pytorch_utils": ["Conv1D"],
    "transformers.core_model_loading": [
        "ConversionOps", "WeightConverter", "WeightRenaming", "convert_and_load_state_dict_in_model",
        "rename_source_key", "revert_weight_conversion",
    ],
    "huggingface_hub.serialization._base": ["parse_size_to_int"],
    "peft.utils.other": ["ModulesToSaveWrapper"],
    "transformers.conversion_mapping": ["get_model_conversion_mapping"],
    "transformers.quantizers": ["HfQuantizer"],
    "transformers.quantizers.base": ["_assign_is_quantized"],
    "torch.nn.modules.linear": ["NonDynamicallyQuantizableLinear"],
    "transformers.quantizers.quantizers_utils": ["get_module_from_name", "should_convert_module"],
    "transformers.quantizers.auto": [
        "AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING", "register_quantization_config",
        "register_quantizer",
    ],
    "transformers.utils.quantization_config": ["QuantizationConfigMixin"],
    "peft.utils.quantization_utils": ["QuantizationBackend"],
    "transformers": ["Trainer", "TrainerCallback", "GenerationConfig", "LogitsProcessor", "LogitsProcessorList"],
    "transformers.trainer_callback": ["ExportableState", "TrainerState"],
    "torch.distributed.tensor": ["DTensor"],
    "torch.optim.optimizer": ["register_optimizer_step_pre_hook", "register_optimizer_step_post_hook"],
    "torch.distributed._composable_state": ["_module_state_mapping"],
    "torch.distributed.fsdp": ["FSDPModule"],
    "accelerate.state": ["AcceleratorState"],
    "trl": ["SFTTrainer", "SFTConfig", "TrlParser", "ScriptArguments", "ModelConfig", "get_peft_config"],
    "trl.trainer.utils": ["create_model_from_path", "pad"],
    "trl.trainer.reward_trainer": ["DataCollatorForPreference"],
    "transformers.models.auto.modeling_auto": ["MODEL_MAPPING", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"],
    "transformers.loss.loss_utils": ["LOSS_MAPPING", "ForCausalLMLoss"],
    "transformers.masking_utils": ["AttentionMaskInterface"],
    "transformers.modeling_utils": ["AttentionInterface"],
    "torch.nn.parallel": ["DistributedDataParallel"],
    "accelerate": ["PartialState"],
}  # fmt: skip


@pytest.mark.parametrize("module", SYMBOLS)
def test_symbols(module):
    found = importlib.import_module(module)
    assert not [name for name in SYMBOLS[module] if not hasattr(found, name)]


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_contracts():
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import register_peft_method
    from transformers import Trainer

    assert {"name", "config_cls", "model_cls"} <= set(parameters(register_peft_method))
    wanted = ["self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"]
    assert parameters(BaseTuner._create_and_replace) == wanted
    assert parameters(BaseTuner._get_adapter_state_dict) == [
        "model",
        "config",
        "adapter_name",
        "state_dict",
        "unwanted_adapter_names",
    ]
    assert parameters(BaseTuner._remap_adapter_state_dict_for_load) == ["model", "config", "adapter_name", "state_dict"]
    assert parameters(BaseTuner._prepare_adapter_config) == ["self", "peft_config", "model_config"]
    assert parameters(BaseTuner._prepare_model) == ["self", "peft_config", "model"]
    assert parameters(BaseTuner._cast_adapter_dtype) == ["self", "adapter_name", "autocast_adapter_dtype"]
    assert parameters(BaseTunerLayer._move_adapter_to_device_of_base_layer) == ["self", "adapter_name", "device"]
    assert parameters(BaseTunerLayer.merge) == ["self", "safe_merge", "adapter_names"]
    assert "persistent" in parameters(BufferDict.__init__)
    assert hasattr(Trainer, "loss_is_scaled_for_ga")


def test_contracts_of_reward_ensembles_best_of_n_and_growing_adapters():
    from torch.nn.parallel import DistributedDataParallel
    from transformers import Trainer
    from transformers.generation.utils import GenerationMixin
    from trl import RewardTrainer

    assert parameters(Trainer._clip_grad_norm) == ["self", "model"]
    assert parameters(RewardTrainer._prepare_dataset)[:3] == ["self", "dataset", "processing_class"]
    source = inspect.getsource(RewardTrainer.__init__)
    assert all(f"self.{name} =" in source for name in ("_metrics", "_total_train_tokens"))
    wanted = {"input_ids", "logits_processor", "stopping_criteria", "generation_config"}
    assert wanted <= set(parameters(GenerationMixin._sample))
    assert {"expand_size", "input_ids"} <= set(parameters(GenerationMixin._expand_inputs_for_generation))
    # after ranks have grown DDP lays its buckets out anew, as unpickling does
    assert {"__getstate__", "__setstate__"} <= set(vars(DistributedDataParallel))


def test_streaming_contracts():
    from transformers import PreTrainedModel

    wanted = ["model", "state_dict", "checkpoint_files", "load_config"]
    assert parameters(PreTrainedModel._load_pretrained_model)[:4] == wanted
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_save")


def test_quantizer_contracts():
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import HfQuantizer

    assert parameters(HfQuantizer.param_needs_quantization)[:3] == ["self", "model", "param_name"]
    assert parameters(HfQuantizer.get_new_dtype) == ["self", "converter", "param", "dtype"]
    assert parameters(HfQuantizer._process_model_before_weight_loading)[:2] == ["self", "model"]
    assert parameters(HfQuantizer._process_model_after_weight_loading)[:2] == ["self", "model"]
    assert hasattr(HfQuantizer, "get_quantize_ops") and "input_dict" in parameters(ConversionOps.convert)


def test_callback_contracts():
    """What kit/monitor leans on: the loop's frame, the column filter, the callback state that the host keeps."""
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import TrainerState

    assert inspect.isfunction(Trainer._inner_training_loop)
    assert parameters(Trainer._set_signature_columns_if_needed) == ["self"]
    assert "_signature_columns" in Trainer._remove_unused_columns.__code__.co_names
    assert {"stateful_callbacks", "log_history", "global_step", "max_steps"} <= set(TrainerState.__dataclass_fields__)
    for event in ("on_train_begin", "on_step_end", "on_log", "on_save", "on_train_end"):
        assert parameters(getattr(TrainerCallback, event))[:4] == ["self", "args", "state", "control"]


def test_scaler_contract():
    """Whether gradients are unscaled already is in the scaler's own books."""
    import torch

    assert hasattr(torch.amp.GradScaler("cpu", init_scale=2.0), "_per_optimizer_states")


def test_calibration_contracts():
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key
    from transformers.pytorch_utils import Conv1D

    assert parameters(get_model_conversion_mapping)[:3] == ["model", "key_mapping", "hf_quantizer"]
    wanted = ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert parameters(rename_source_key)[:5] == wanted
    assert hasattr(PreTrainedModel, "base_model") and "forward" in vars(Conv1D)


def test_torch_kernels_of_packed_rows():
    """Without them the packed layer is slow, not wrong."""
    import torch

    for bits in ("2bit", "4bit", "byte"):
        assert hasattr(torch.ops.quantized, f"embedding_bag_{bits}_unpack")
        assert hasattr(torch.ops.quantized, f"embedding_bag_{bits}_rowwise_offsets")


def test_bitsandbytes_private_inverse():
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    assert parameters(modules._convert_weight_packed_for_cpu_inverse)[:2] == ["packed_weight", "quant_state"]
