"""`hf-rnn convert SOURCE TARGET`: a checkpoint of transformers' own `xlstm` (such as NX-AI/xLSTM-7b) or weights of the
`xlstm` package to one of ours; one of ours to transformers' `xlstm`."""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.hub import cached_file

from hf_rnn import XLSTMConfig, XLSTMForCausalLM
from hf_rnn.models.xlstm.conversion_xlstm import to_transformers_config, transformers_weights


def convert(source: str, target: Path, **options) -> str:
    """Write the checkpoint that `source` is in the other format.

    Args:
        source: a folder or a name on the Hub; or a file (.pt, .safetensors) with the state dict of an xLSTMLMModel.
        target: a new or empty folder.
        options: of `save_pretrained`.

    Returns:
        The model_type of what was written.
    """
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"target: {target} is not empty; choose a new folder")
    if Path(source).is_file():
        weights = load_file(source) if source.endswith(".safetensors") else torch.load(source, weights_only=True)
        XLSTMForCausalLM.from_xlstm(weights).save_pretrained(target, **options)
        return XLSTMConfig.model_type
    model_type = AutoConfig.from_pretrained(source).model_type
    if model_type == "xlstm":
        XLSTMForCausalLM.from_pretrained(source).save_pretrained(target, **options)
        written = XLSTMConfig.model_type
    elif model_type == XLSTMConfig.model_type:
        to_transformers(XLSTMForCausalLM.from_pretrained(source), target, **options)
        written = "xlstm"
    else:
        raise ValueError(f"source: expected an xlstm or a {XLSTMConfig.model_type}, got a {model_type}")
    if cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False):
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return written


def to_transformers(model: XLSTMForCausalLM, target: Path, **options) -> None:
    """Save a model as a checkpoint of transformers' `xlstm`."""
    config = to_transformers_config(model.config)  # type: ignore[arg-type]
    config.dtype = model.dtype
    model._weight_conversions = transformers_weights()  # type: ignore[assignment]
    model.save_pretrained(target, save_original_format=True, **options)
    config.save_pretrained(target)
    (target / "modeling_hf_rnn.py").unlink()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn convert", description=__doc__)
    parser.add_argument("source", help="a checkpoint's folder or name on the Hub, or a file with a state dict")
    parser.add_argument("target", type=Path, help="a new folder")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file with weights")
    arguments = parser.parse_args(argv)
    written = convert(arguments.source, arguments.target, max_shard_size=arguments.max_shard_size)
    print(f"saved {arguments.target}, a checkpoint of a {written}")
