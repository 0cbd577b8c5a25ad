"""`hf-rnn convert SOURCE TARGET`: convert checkpoints between formats. To this package's: from transformers' `xlstm`
(such as NX-AI/xLSTM-7b), the `tirex-2` package (NX-AI/TiRex-2) or weights of the `xlstm` package. From it: to
transformers' `xlstm` or `tirex-2`."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from hf_rnn import TiRex2Config, TiRex2ForPrediction, XLSTMConfig, XLSTMForCausalLM
from hf_rnn.models.tirex2.conversion_tirex2 import tirex_weights
from hf_rnn.models.tirex2.tirex_config import to_tirex_config
from hf_rnn.models.xlstm.conversion_xlstm import check_complete, transformers_weights
from hf_rnn.models.xlstm.transformers_config import to_transformers_config
from hf_rnn.tokenization.reading import read_tokenizer


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
        XLSTMForCausalLM.from_xlstm(read_weights(source)).save_pretrained(target, **options)
        return XLSTMConfig.model_type
    settings, _ = PreTrainedConfig.get_config_dict(source)
    if "stack_config" in settings or settings.get("model_type") == TiRex2Config.model_type:
        return convert_tirex(source, target, "stack_config" in settings, **options)
    model_type = AutoConfig.from_pretrained(source).model_type
    if model_type not in ("xlstm", XLSTMConfig.model_type):
        raise ValueError(f"source: expected an xlstm or a {XLSTMConfig.model_type}, got a {model_type}")
    model, info = XLSTMForCausalLM.from_pretrained(source, output_loading_info=True)
    check_complete(info, "source")
    if model_type == "xlstm":
        model.save_pretrained(target, **options)
        written = XLSTMConfig.model_type
    else:
        to_transformers(model, target, **options)
        written = "xlstm"
    if cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False):
        read_tokenizer(source).save_pretrained(target)
    return written


def convert_tirex(source: str, target: Path, theirs: bool, **options) -> str:
    """`convert` of a TiRex-2, `theirs` or one of ours."""
    model, info = TiRex2ForPrediction.from_pretrained(source, output_loading_info=True)
    check_complete(info, "source")
    if theirs:
        model.save_pretrained(target, **options)
        return TiRex2Config.model_type
    config = to_tirex_config(model.config)
    model._weight_conversions = tirex_weights()
    model.save_pretrained(target, save_original_format=True, **options)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / "modeling_hf_rnn.py").unlink()
    return "tirex-2"


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """A state dict from a file of safetensors or of torch."""
    try:
        weights = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler stumbles over
        raise ValueError(f"source: {path} cannot be read as a state dict ({error})") from error
    if not isinstance(weights, dict):
        raise ValueError(f"source: expected a state dict in {path}, got a {type(weights).__name__}")
    return weights


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
    parser.add_argument("--max_shard_size", default="5GB", help="largest size of a weights file")
    arguments = parser.parse_args(argv)
    written = convert(arguments.source, arguments.target, max_shard_size=arguments.max_shard_size)
    print(f"saved {arguments.target}, a checkpoint of a {written}")
