"""Writing a model as quantised, entropy-coded tensors in ordinary safetensors shards."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_rnn.compression.base import base_tensors, fingerprint, relative_to
from hf_rnn.compression.quantizer import DIFFERENCE, SUFFIX, UNREADABLE, CodedConfig, CodedQuantizer
from hf_rnn.compression.search import choose_exponents, coded_parameters, difference, restored
from hf_rnn_kernels.coding import CODERS, check_range, dequantize, encode_tensor, quantize, store_tensor


@dataclass(frozen=True)
class Compression:
    """A compressed model: `payloads`, the coded tensors by name, and what it cost and saved.

    `bits` a coded weight, headers and tables included; `bytes` of all tensors, coded or not, and `float_bytes` that
    they had before. `fingerprints` are of the base's tensors that payloads are differences to.
    """

    payloads: dict[str, Tensor] = field(repr=False)
    bits: float
    bytes: int
    float_bytes: int
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False)

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
    base: str | Path | None = None,
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
        base: the checkpoint that the model was fine-tuned from, a folder or a name on the Hub: what is quantised and
            coded is the difference to it, and `max_error` is relative to that. What is as in the base costs next to
            nothing; tensors that it does not have, as of a new head, are coded whole.

    Returns:
        The `Compression`; the model now has the quantised weights.
    """
    given = [name for name, x in dict(step=step, max_error=max_error, evaluate=evaluate).items() if x is not None]
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: each says how coarse to be; give one")
    if coder not in CODERS:
        raise ValueError(f"coder: expected one of {CODERS}, got {coder!r}")
    if not 0 <= rate < float("inf"):
        raise ValueError(f"rate: expected a finite number of at least 0, got {rate}")
    parameters = coded_parameters(model, exclude)
    bases = {} if base is None else base_tensors(model, base)
    exponents = choose_exponents(parameters, step, max_error, evaluate, max_loss_increase, rate, bases)
    for name, p in parameters.items():  # all, before the first is changed
        check_range(difference(p, bases.get(name)), exponents[name])
    payloads = {}
    for name, p in tqdm(parameters.items(), desc="coding weights", leave=False):
        x = difference(p, bases.get(name))
        q = quantize(x, exponents[name], rate)
        with torch.no_grad():
            p.copy_(restored(dequantize(q, exponents[name], x.dtype), bases.get(name), p.dtype))
        payloads[name] = encode_tensor(q, exponents[name], x.dtype, coder)
    tensors, count = _tensors(model), sum(p.numel() for p in parameters.values())
    bits = 8 * sum(p.numel() for p in payloads.values()) / max(count, 1)
    for name in bases.keys() & tensors.keys() - payloads.keys():
        x = tensors[name]
        if x.is_floating_point() and torch.equal(x.cpu(), bases[name].to(x.dtype)):
            zeros = torch.zeros_like(x, dtype=torch.int32)
            payloads[name] = encode_tensor(zeros, 0, torch.promote_types(x.dtype, torch.float32), coder)
    sizes = {name: x.numel() * x.element_size() for name, x in tensors.items()}
    rest = sum(size for name, size in sizes.items() if name not in payloads)
    coded = sum(p.numel() for p in payloads.values())
    fingerprints = {name: fingerprint(bases[name]) for name in payloads if name in bases}
    return Compression(payloads, bits, coded + rest, sum(sizes.values()), fingerprints)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint has: parameters and buffers, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: x for name, x in model.state_dict().items() if name not in tied}


def save_compressed(
    model: PreTrainedModel, folder: str | Path, max_shard_size: str = "5GB", **options: Any
) -> Compression:
    """`compress` a model and write a checkpoint that `from_pretrained` reads where `hf_rnn` is imported.

    The folder is `save_pretrained`'s, shards of model.safetensors with a U8 tensor `NAME.coded` for each, coded or
    stored as it is; `quantization_config` in config.json names the reader and all tensors. Loaded, the model has the
    quantised weights bit for bit and is like any other: it trains, and saves plainly. With `base` the tensors are
    `NAME.difference`; loading reads the base, too, and refuses one whose tensors are not the same bit for bit.

    Args:
        model: changed in place: afterwards its weights are the quantised ones.
        folder: where to.
        max_shard_size: of a file.
        options: of `compress`.

    Raises:
        ValueError: adapters, another quantizer, a folder with weights, or an option of `compress`; the model is then as
            it was.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("model: expected a PreTrainedModel without adapters; merge_and_unload() them first")
    if getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None):
        raise ValueError("model: expected plain weights, these have a quantizer of their own; dequantize() them first")
    if any(Path(folder).glob("*.safetensors")):
        raise ValueError(f"folder: {folder} holds weights already; choose a new one")
    result = compress(model, **options)
    tensors = _tensors(model)
    config = CodedConfig(list(tensors))
    if options.get("base") is not None:
        config.base, config.fingerprints = relative_to(options["base"], folder), result.fingerprints
    quantizer = CodedQuantizer(config, pre_quantized=True)
    for name, x in tensors.items():
        payload = result.payloads[name] if name in result.payloads else store_tensor(x)
        quantizer.state_dict[name + (DIFFERENCE if name in result.fingerprints else SUFFIX)] = payload
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config  # type: ignore
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False)
    finally:
        del model.hf_quantizer, model.config.quantization_config
    path = Path(folder) / "config.json"
    written = json.loads(path.read_text()) | {"transformers_weights": UNREADABLE}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    return result
