"""How transformers reads coded weights: its quantizer extension point, registered by `import hf_rnn`."""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rnn.skeleton.versions import QuantizerHooks
from hf_rnn_kernels.coding import CorruptPayloadError, decode_tensor, read_header

METHOD = "hf_rnn_coded"
SUFFIX = ".coded"  # of a coded tensor's name in a checkpoint
# In config.json in the place of a file's name: where this module is not imported, transformers refuses it and shows it.
# Else it would only warn of an unknown quantization, and start from random weights.
UNREADABLE = "weights coded by hf_rnn: `pip install hf-rnn`, then `import hf_rnn` before from_pretrained"


@register_quantization_config(METHOD)
class CodedConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint whose matrices are coded payloads, `NAME.coded` for each `NAME`.

    Args:
        tensors: names of all that the checkpoint has; each has to arrive.
        package: what reads it, for people who look into the file.
    """

    def __init__(
        self, tensors: list[str] | None = None, package: str = "hf-rnn", quant_method: str = METHOD, **kwargs: Any
    ):
        self.quant_method = quant_method  # type: ignore[assignment]
        if not isinstance(tensors or [], list) or not all(isinstance(name, str) for name in tensors or []):
            raise ValueError(f"quantization_config: tensors: expected a list of names, got {tensors!r:.200}")
        self.tensors = tensors or []
        self.package = package


class _Decode(ConversionOps):
    """Coded to plain. Damage is noted, not raised: the loader would bury the message in a report of its own."""

    def __init__(self) -> None:
        self.damaged: list[str] = []
        self.arrived: set[str] = set()

    def __deepcopy__(self, memo: dict) -> "_Decode":
        return self  # the loader copies operations for each tensor; the notes are of all

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", model=None, **kwargs) -> dict[str, Any]:
        ((_, found),) = input_dict.items()
        payload = found[0] if isinstance(found, list) else found
        like = model.get_parameter_or_buffer(full_layer_name)
        self.arrived.add(full_layer_name)
        try:
            header, _ = read_header(payload, full_layer_name)
            if header.shape != tuple(like.shape):  # before it is decoded: what it says may not fit into memory
                raise CorruptPayloadError(f"{full_layer_name}: expected shape {tuple(like.shape)}, got {header.shape}")
            weights = decode_tensor(payload, full_layer_name)
        except CorruptPayloadError as error:
            self.damaged.append(str(error))
            weights = torch.zeros(like.shape)
        return {full_layer_name: weights.to(like.dtype) if weights.is_floating_point() else weights}


@register_quantizer(METHOD)
class CodedQuantizer(QuantizerHooks):
    """Decodes each tensor as it is loaded; what comes out is an ordinary model, as if its weights had been stored."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError("quantization_config: weights are coded when saved, by `hf_rnn.save_compressed`")
        self.state_dict: dict[str, Tensor] = {}  # what `save_compressed` writes
        self._decode = _Decode()

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter(re.escape(SUFFIX) + "$", "", [self._decode], force_cpu=True)]

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._decode.damaged += [
            f"{name}: missing, or its name is damaged; get the file again" for name in self._missing(model)
        ]
        if self._decode.damaged:
            raise CorruptPayloadError("\n".join(self._decode.damaged))
        model._weight_conversions = []  # type: ignore[assignment]  # saved again, it is stored plainly
        self.remove_quantization_config(model)
        return model

    def before_files(self, config):
        """They have their usual names."""
        if getattr(config, "transformers_weights", None) == UNREADABLE:
            del config.transformers_weights
        return config

    def _missing(self, model: PreTrainedModel) -> list[str]:
        """What the checkpoint should have and this model wants, by its name with or without the backbone's prefix."""
        wanted, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        missing = []
        for name in self.quantization_config.tensors:  # type: ignore[attr-defined]
            names = {name, name.removeprefix(prefix), prefix + name}
            if names & wanted - tied and not names & self._decode.arrived:
                missing.append(name)
        return missing

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.state_dict, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
