"""Writing a model as quantised, entropy-coded tensors in ordinary safetensors shards."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_rnn.compression.quantizer import SUFFIX, CodedConfig, CodedQuantizer
from hf_rnn.compression.search import choose_exponents, coded_parameters
from hf_rnn_kernels.coding import dequantize, encode_tensor, quantize


@dataclass(frozen=True)
class Compression:
    """A compressed model: `payloads`, the coded tensors by name, and what it cost and saved.

    `bits` a coded weight, headers and tables included; `bytes` of all tensors, coded or not, and `float_bytes` that
    they had before.
    """

    payloads: dict[str, Tensor]
    bits: float
    bytes: int
    float_bytes: int

    def __str__(self) -> str:
        share = self.bytes / max(self.float_bytes, 1)
        return f"{self.bits:.2f} bits a coded weight; {self.bytes:,} bytes, {share:.1%} of {self.float_bytes:,}"


def compress(
    model: PreTrainedModel,
    step: float | Mapping[str, int] | None = None,
    max_error: float | None = None,
    evaluate: Callable[[], float] | None = None,
    max_loss_increase: float = 0.005,
    rate: float = 0.1,
    coder: str = "ans",
    exclude: str = r"norm|bias",
) -> Compression:
    """Quantise a model's matrices in place and code them.

    One of `step`, `max_error` and `evaluate` says how coarse; with none of them `max_error` is 0.05.

    Args:
        step: of all tensors, a power of two; or the exponent of each, by name.
        max_error: root mean square error of each tensor over its root mean square: the coarsest step within it.
        evaluate: a loss of the model as it is, on calibration data: steps are searched one by one for the fewest bits
            at which the loss is at most `max_loss_increase` above what it is now.
        max_loss_increase: as a share, 0.005 for half a percent.
        rate: how many squared steps of error a bit is worth where weights are rounded (`quantize`). 0 rounds.
        coder: "ans", or "exp_golomb".
        exclude: regular expression of parameters that stay as they are; those of one dimension always do.

    Returns:
        The `Compression`; the model now has the quantised weights.
    """
    given = [name for name, x in dict(step=step, max_error=max_error, evaluate=evaluate).items() if x is not None]
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: each says how coarse to be; give one")
    parameters = coded_parameters(model, exclude)
    exponents = choose_exponents(parameters, step, max_error, evaluate, max_loss_increase, rate)
    payloads, coded = {}, 0
    for name, p in tqdm(parameters.items(), desc="coding weights", leave=False):
        q = quantize(p, exponents[name], rate)
        with torch.no_grad():
            p.copy_(dequantize(q, exponents[name], p.dtype))
        payloads[name] = encode_tensor(q, exponents[name], p.dtype, coder)
        coded += p.numel()
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    payload_bytes = sum(p.numel() for p in payloads.values())
    rest = sum(size for name, size in sizes.items() if name not in payloads)
    return Compression(payloads, 8 * payload_bytes / max(coded, 1), payload_bytes + rest, sum(sizes.values()))


def save_compressed(
    model: PreTrainedModel, folder: str | Path, max_shard_size: str = "5GB", **options: Any
) -> Compression:
    """`compress` a model and write a checkpoint that `from_pretrained` reads where `hf_rnn` is imported.

    The folder is `save_pretrained`'s, shards of model.safetensors with U8 tensors `NAME.coded` for coded weights; a
    `quantization_config` in config.json names the reader. Loaded, the model has the quantised weights bit for bit and
    is like any other: it trains, and saves plainly.

    Args:
        model: changed in place: afterwards its weights are the quantised ones.
        folder: where to.
        max_shard_size: of a file.
        options: of `compress`.
    """
    result = compress(model, **options)
    quantizer = CodedQuantizer(CodedConfig(), pre_quantized=True)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for name, tensor in model.state_dict().items():
        if name in result.payloads:
            quantizer.state_dict[name + SUFFIX] = result.payloads[name]
        elif name not in tied:
            quantizer.state_dict[name] = tensor
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config  # type: ignore
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False)
    finally:
        del model.hf_quantizer, model.config.quantization_config
    return result
