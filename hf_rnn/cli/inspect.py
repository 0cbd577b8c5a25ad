"""`hf-rnn inspect CHECKPOINT`: each tensor's shape, the shape nu of its density, its bits a weight and its zeros."""

import argparse
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_rnn.compression.quantizer import DIFFERENCE, SUFFIX
from hf_rnn_kernels.coding import GeneralizedGaussian, decode_tensor, read_header

ROW = "{:44} {:>16} {:>9} {:>14} {:>6} {:>8} {:>8}"


def describe(name: str, tensor: Tensor) -> tuple[str, int, int]:
    """A row of the table, how many weights, and their bytes in the file."""
    size, stored, step = tensor.numel() * tensor.element_size(), "", ""
    if name.endswith((SUFFIX, DIFFERENCE)):
        name = name.removesuffix(SUFFIX)
        header, _ = read_header(tensor, name)
        stored, step = (header.coder, f"2^{header.exponent}") if header.coder != "raw" else ("", "")
        tensor = decode_tensor(tensor, name)
    count = tensor.numel()
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"checkpoint: {name} has weights that are not finite")
    nu = f"{GeneralizedGaussian.fit(tensor).shape:.2f}" if count and tensor.is_floating_point() else "-"
    zeros = f"{float((tensor == 0).float().mean()):.1%}" if count else "-"
    shape = "x".join(map(str, tensor.shape))
    stored = stored or str(tensor.dtype).removeprefix("torch.")
    return ROW.format(name, shape, nu, stored, step, f"{8 * size / max(count, 1):.2f}", zeros), count, size


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn inspect", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or its name on the Hub")
    checkpoint = parser.parse_args(argv).checkpoint
    folder = Path(checkpoint)
    if not folder.is_dir():
        folder = Path(snapshot_download(checkpoint, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint: {checkpoint} has no safetensors files")
    print(ROW.format("tensor", "shape", "nu", "stored as", "step", "bits", "zeros"))
    weights = size = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    row, count, taken = describe(name, file.get_tensor(name))
                    weights, size = weights + count, size + taken
                    print(row)
        except SafetensorError as error:
            raise ValueError(f"checkpoint: {path} is damaged ({error}); get the file again") from error
    print(f"{weights:,} weights in {size:,} bytes: {8 * size / max(weights, 1):.2f} bits each")
