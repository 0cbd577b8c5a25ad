"""How transformers reads coded weights: its quantizer extension point, registered by `import hf_rnn`."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rnn.compression.base import base_tensors, fingerprint, seen_from
from hf_rnn.compression.search import restored
from hf_rnn.skeleton.versions import QuantizerHooks
from hf_rnn_kernels.coding import CorruptPayloadError, decode_tensor, read_header

METHOD = "hf_rnn_coded"
SUFFIX = ".coded"  # of a coded tensor's name in a checkpoint
# Of one that is added to the base's. Another suffix, so that versions which know no bases miss the tensor.
DIFFERENCE = ".difference"
# In config.json in the place of a file's name: where this module is not imported, transformers refuses it and shows it.
# Else it would only warn of an unknown quantization, and start from random weights.
UNREADABLE = "weights coded by hf_rnn: `pip install hf-rnn`, then `import hf_rnn` before from_pretrained"


@register_quantization_config(METHOD)
class CodedConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint whose matrices are coded payloads, `NAME.coded` for each `NAME`, or
    `NAME.difference` to the tensor of another checkpoint.

    Args:
        tensors: names of all that the checkpoint has; each has to arrive.
        package: what reads it, for people who look into the file.
        base: the other checkpoint: a folder, as seen from this one's, or a name on the Hub.
        fingerprints: of the base's tensors that differences are added to, by name.
    """

    def __init__(
        self,
        tensors: list[str] | None = None,
        package: str = "hf-rnn",
        base: str | None = None,
        fingerprints: dict[str, str] | None = None,
        quant_method: str = METHOD,
        **kwargs: Any,
    ):
        self.quant_method = quant_method  # type: ignore[assignment]
        if not isinstance(tensors or [], list) or not all(isinstance(name, str) for name in tensors or []):
            raise ValueError(f"quantization_config: tensors: expected a list of names, got {tensors!r:.200}")
        if not isinstance(base, str | None) or not isinstance(fingerprints, dict | None):
            raise ValueError(
                f"quantization_config: base, fingerprints: expected a name and an object, got {base!r:.200}"
            )
        self.tensors = tensors or []
        self.package = package
        self.base, self.fingerprints = base, fingerprints or {}

    def to_dict(self) -> dict[str, Any]:
        """Without what is not set: a checkpoint without a base is as it always was."""
        return {key: x for key, x in super().to_dict().items() if key not in ("base", "fingerprints") or x}


class _Base:
    """The tensors that differences are added to, read when the first of them comes."""

    def __init__(self, config: CodedConfig):
        self.config, self.folder = config, "."
        self._tensors: dict[str, Tensor] | None = None
        self._wrong = ""

    def __call__(self, model: PreTrainedModel, name: str) -> Tensor:
        """The base's tensor of the model's name; ValueError, each time the same, where something is wrong with it."""
        if self._tensors is None and not self._wrong:
            try:
                self._tensors = base_tensors(model, seen_from(self.config.base or "", self.folder))
            except (OSError, ValueError) as error:
                self._wrong = f"cannot read {self.config.base!r}, whose fine-tune this is ({error})"
        x, prefix = (self._tensors or {}).get(name), f"{model.base_model_prefix}."
        names = (name, name.removeprefix(prefix), prefix + name)
        expected = next((self.config.fingerprints[n] for n in names if n in self.config.fingerprints), None)
        if not self._wrong and (x is None or fingerprint(x) != expected):
            self._wrong = f"{self.config.base!r} is not what this was fine-tuned from: {name} differs"
        if self._wrong or x is None:
            raise ValueError(f"base: {self._wrong}; config.json says where it is, quantization_config, base")
        return x


class _Notes:
    """What was found in the tensors that were loaded."""

    def __init__(self) -> None:
        self.damaged: list[str] = []
        self.arrived: set[str] = set()


class _Decode(ConversionOps):
    """Coded to plain. Damage is noted, not raised: the loader would bury the message in a report of its own."""

    def __init__(self, notes: "_Notes", base: _Base | None = None) -> None:
        self.notes, self.base = notes, base

    def __deepcopy__(self, memo: dict) -> "_Decode":
        return self  # the loader copies operations for each tensor; the notes are of all

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", model=None, **kwargs) -> dict[str, Any]:
        ((_, found),) = input_dict.items()
        payload = found[0] if isinstance(found, list) else found
        like = model.get_parameter_or_buffer(full_layer_name)
        self.notes.arrived.add(full_layer_name)
        try:
            header, _ = read_header(payload, full_layer_name)
            if header.shape != tuple(like.shape):  # before it is decoded: what it says may not fit into memory
                raise CorruptPayloadError(f"{full_layer_name}: expected shape {tuple(like.shape)}, got {header.shape}")
            weights = decode_tensor(payload, full_layer_name)
            if self.base is not None:
                weights = restored(weights, self.base(model, full_layer_name), like.dtype)
        except ValueError as error:
            self.notes.damaged.append(str(error))
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
        self._notes, self._base = _Notes(), _Base(quantization_config)  # type: ignore[arg-type]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files=None, **kwargs: Any
    ) -> None:
        if checkpoint_files:
            self._base.folder = str(Path(checkpoint_files[0]).parent)

    def get_weight_conversions(self) -> list[WeightConverter]:
        plain, added = _Decode(self._notes), _Decode(self._notes, self._base)
        return [
            WeightConverter(re.escape(suffix) + "$", "", [operation], force_cpu=True)
            for suffix, operation in ((SUFFIX, plain), (DIFFERENCE, added))
        ]

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._notes.damaged += [
            f"{name}: missing, or its name is damaged; get the file again" for name in self._missing(model)
        ]
        if self._notes.damaged:
            raise CorruptPayloadError("\n".join(dict.fromkeys(self._notes.damaged)))
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
            if names & wanted - tied and not names & self._notes.arrived:
                missing.append(name)
        return missing

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.state_dict, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
