"""Weights of 8 or 4 bits in memory: `from_pretrained(name, quantization_config=WeightOnlyConfig(bits=8))`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rnn.compression.quantizer import METHOD as CODED
from hf_rnn_kernels.packed_linear import PackedLinear, PackedMatrix, check_bits, choose_group, is_exact

METHOD = "hf_rnn_packed"
logger = logging.get_logger(__name__)


@register_quantization_config(METHOD)
class WeightOnlyConfig(QuantizationConfigMixin):
    """`quantization_config` of a model whose linear layers are integers, each group of them with a scale.

    Symmetric, the nearest integers; sums and states stay float32. Tokens on a CPU are multiplied from the integers as
    they lie, prompts and other devices unpack a block of them at a time. The embedding, a head tied to it,
    convolutions, norms, biases and exponential gates stay float32.

    Args:
        bits: 8 or 4.
        group_size: neighbours in a row that share a scale; None: the whole row in 8 bits, in 4 the fewest from 64 on.
        modules_to_not_convert: names of linear layers, or their endings, that stay float32.
        packed: names of the layers that are packed; filled in when they are.
    """

    def __init__(
        self,
        bits: int = 8,
        group_size: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        packed: list[str] | None = None,
        quant_method: str = METHOD,
        **kwargs: Any,
    ):
        self.quant_method = quant_method  # type: ignore[assignment]
        check_bits(bits, group_size)
        for name, value in dict(modules_to_not_convert=modules_to_not_convert, packed=packed).items():
            if not isinstance(value or [], list) or not all(isinstance(x, str) for x in value or []):
                raise ValueError(f"{name}: expected a list of names, got {value!r:.200}")
        self.bits, self.group_size = bits, group_size
        self.modules_to_not_convert = modules_to_not_convert
        self.packed = packed

    def pack_exactly(self, model: PreTrainedModel) -> PreTrainedModel:
        """Pack the layers that lose nothing by it, as those of a coded checkpoint; the others stay float32."""
        return _mark(model, WeightOnlyQuantizer(self, pre_quantized=True), _pack(model, self, exact=True))


def packed_from_coded(model_class: Any, source: Any, kwargs: dict) -> tuple[WeightOnlyConfig | None, dict]:
    """A `WeightOnlyConfig` for a checkpoint of coded integers, taken out of from_pretrained's arguments: transformers
    takes one quantization from a file and none beside it."""
    asked = _config_of(kwargs.get("quantization_config"))
    if asked is None or source is None:
        return None, kwargs
    rest = {name: x for name, x in kwargs.items() if name != "quantization_config"}
    dicts = model_class.config_class.get_config_dict(source, **{k: x for k, x in rest.items() if k != "config"})
    there = dicts[0].get("quantization_config") or {}
    if there.get("quant_method") == METHOD and there.get("bits") != asked.bits:
        raise ValueError(
            f"quantization_config: {source} is packed in {there.get('bits')} bits, asked for are {asked.bits}; leave "
            "it out, or dequantize() the model and pack it anew"
        )
    return (asked, rest) if there.get("quant_method") == CODED else (None, kwargs)


def _config_of(x: Any) -> WeightOnlyConfig | None:
    """A `WeightOnlyConfig`, also as the dict that it is in a file."""
    if isinstance(x, dict) and x.get("quant_method") == METHOD:
        return WeightOnlyConfig.from_dict(x)
    return x if isinstance(x, WeightOnlyConfig) else None


RECURRENT = "recurrent_weight"  # (heads, O, I), a mixer's own parameter


def _weight(part: nn.Linear | nn.Parameter) -> Tensor:
    return part.weight if isinstance(part, nn.Linear) else part


def _replace(model: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
    parent, _, own = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(part, nn.Module):
        part.train(owner.training)
    delattr(owner, own)
    setattr(owner, own, part)
    model.__dict__.pop("_fused_step", None)  # which holds the weights of before


def _layers(model: nn.Module, config: WeightOnlyConfig) -> dict[str, nn.Linear | nn.Parameter]:
    """Linear layers and recurrent weights to pack, by name."""
    plain = {f"{name}.{part}" for name, m in model.named_modules() for part in getattr(m, "exact_parts", ())}
    plain |= {name.rpartition(".")[0] for name in getattr(model, "all_tied_weights_keys", None) or {}}
    kept = tuple(config.modules_to_not_convert or ())
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    recurrent = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == RECURRENT}
    found: dict[str, nn.Linear | nn.Parameter] = {**linears, **recurrent}
    for k in kept:
        if not any(name == k or name.endswith(f".{k}") for name in found):
            raise ValueError(f"modules_to_not_convert: no linear layer or recurrent weight is named {k!r}")
    for name, part in found.items():
        if config.bits == 4 and config.group_size is None and _weight(part).shape[-1] % 2:
            logger.warning(
                f"{name}: an odd number of inputs, {_weight(part).shape[-1]}; it stays {_weight(part).dtype}"
            )
            plain.add(name)
    return {
        name: part
        for name, part in found.items()
        if name not in plain and not any(name == k or name.endswith(f".{k}") for k in kept)
    }


def _pack(model: PreTrainedModel, config: WeightOnlyConfig, exact: bool = False) -> list[str]:
    """Pack a model's layers, one after another; returns their names."""
    layers = _layers(model, config)
    for name, part in layers.items():  # all, before the first is changed
        choose_group(_weight(part).shape[-1], config.bits, config.group_size, name)
        if not _weight(part).isfinite().all():
            raise ValueError(f"{name}: expected finite weights, got NaN or infinity")
    names = []
    for name in list(layers):
        part = layers.pop(name)  # its weights are freed before the next one is packed
        if exact and not is_exact(_weight(part), config.bits, config.group_size):
            logger.warning(f"{name}: more than {config.bits} bits; it stays {_weight(part).dtype}")
            continue
        kind = PackedMatrix if isinstance(part, Tensor) else PackedLinear
        packed = kind.of(part, config.bits, config.group_size)  # type: ignore[arg-type]
        packed._is_hf_initialized = True  # type: ignore[assignment]  # as if its weights were plain ones
        _replace(model, name, packed)
        names.append(name)
    return names


def pack_model(model: PreTrainedModel, config: WeightOnlyConfig) -> PreTrainedModel:
    """Pack a model that is in memory, as `from_pretrained` does what it loads; in place.

    Raises:
        ValueError: one that has a quantizer already.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("model: expected plain weights, these have a quantizer of their own; dequantize() them first")
    return _mark(model, WeightOnlyQuantizer(config, pre_quantized=True), _pack(model, config))


def packed_room(model: PreTrainedModel) -> PreTrainedModel:
    """The model with packed layers, empty ones, where its config says so."""
    config = _config_of(getattr(model.config, "quantization_config", None))
    if config is not None:
        _make_room(model, config)
    return model


def _make_room(model: PreTrainedModel, config: WeightOnlyConfig) -> None:
    prefix = f"{model.base_model_prefix}."
    backbone = not hasattr(model, model.base_model_prefix)
    for name in config.packed or []:
        if "." not in name and not hasattr(model, name):
            continue  # another head's
        parts = dict(model.named_modules()) | dict(model.named_parameters())
        own = name.removeprefix(prefix) if backbone else name if name in parts else prefix + name
        part = parts.get(own)
        if type(part) not in (nn.Linear, nn.Parameter):
            raise ValueError(f"quantization_config: packed: no linear layer of this model is named {name!r}")
        with torch.device("meta"):
            packed: nn.Module
            if isinstance(part, nn.Linear):
                sizes = part.in_features, part.out_features, part.bias is not None
                packed = PackedLinear(*sizes, config.bits, config.group_size)
            else:
                packed = PackedMatrix(part.shape, config.bits, config.group_size)  # type: ignore[union-attr, arg-type]
        packed._is_hf_initialized = True  # type: ignore[assignment]
        _replace(model, own, packed)


def _mark(model: PreTrainedModel, quantizer: HfQuantizer, names: list[str]) -> PreTrainedModel:
    quantizer.quantization_config.packed = names  # type: ignore[attr-defined]
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, METHOD  # type: ignore[assignment]
    return model


@register_quantizer(METHOD)
class WeightOnlyQuantizer(HfQuantizer):
    """Packs layers when plain weights are loaded, or makes room for those that a checkpoint has packed."""

    quantization_config: WeightOnlyConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            _make_room(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            return _mark(model, self, _pack(model, self.quantization_config))
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear | PackedMatrix):
                module.check(name)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                _replace(model, name, module.dequantize().to(dtype))
            elif isinstance(module, PackedMatrix):
                _replace(model, name, nn.Parameter(module.dequantize().to(dtype)))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # by adapters: without any, Trainer refuses

    @property
    def is_compileable(self) -> bool:
        return True
