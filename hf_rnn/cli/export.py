"""`hf-rnn export CHECKPOINT FILE.onnx`: write a model as an ONNX file and compare outputs and speed with torch."""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from hf_rnn import StatefulModel, to_onnx
from hf_rnn.hub.loading import load
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel

SHAPES = [(1, 1), (5, 1), (2, 17), (1, 512), (4, 512)]  # (B, T)
TOLERANCE = 1e-4


class Session:
    """An ONNX file in onnxruntime, on the CPU, called as the `StatefulModel` that it was."""

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on waiting for work on the cores that are torch's next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [x.name for x in self.session.get_inputs()]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        given = {name: x.numpy() for name, x in zip(self.names, tensors, strict=True)}
        return [torch.from_numpy(x) for x in self.session.run(None, given)]


def relative_error(x: Tensor, reference: Tensor) -> float:
    """RMS(x - reference) / RMS(reference)."""
    return float((x - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt().clamp_min(1e-30))


def milliseconds(run: Callable, repeats: int = 5) -> float:
    """Of a call, the median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def inputs(whole: StatefulModel, batch: int, length: int) -> list[Tensor]:
    """Random ones; with padding on the left of the first row."""
    first, *masks = whole.example(batch, length)
    if first.is_floating_point():
        random = torch.randn_like(first)
    else:
        random = torch.randint_like(first, whole.model.config.vocab_size)
        random = random.where(random != whole.model.config.pad_token_id, first)
    for mask in masks:
        mask[0, : length // 3] = 0
    return [random, *masks, *whole.initial_states(batch)]


def errors(found: list[Tensor], expected: tuple[Tensor, ...], masks: list[Tensor]) -> list[float]:
    """Of each output, where it is of tokens at real ones."""
    pairs = zip(found, expected, strict=True)
    real = [mask.bool() for mask in masks]
    at = [(x[real[0]], y[real[0]]) if real and y.shape[:2] == real[0].shape else (x, y) for x, y in pairs]
    return [relative_error(x, y) for x, y in at]


@torch.no_grad()
def compare(whole: StatefulModel, session: Session) -> float:
    """The largest relative RMS error of outputs and states at a few batch sizes and lengths; prints a line for each."""
    worst = 0.0
    print(f"{'batch':>6} {'length':>7} {'error':>9} {'torch ms':>10} {'onnx ms':>10}")
    for batch, length in SHAPES:
        given = inputs(whole, batch, length)
        error = max(errors(session(*given), whole(*given), given[1 : 1 + whole.padding]))
        ours, theirs = milliseconds(lambda: whole(*given)), milliseconds(lambda: session(*given))  # noqa: B023
        print(f"{batch:6} {length:7} {error:9.1e} {ours:10.2f} {theirs:10.2f}", flush=True)
        worst = max(worst, error)
    return worst


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn export", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or its name on the Hub")
    parser.add_argument("file", type=Path, help="the ONNX file to write")
    parser.add_argument(
        "--padding", action="store_true", help="add the input attention_mask; without it no token may be padding"
    )
    arguments = parser.parse_args(argv)
    for package in ("onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise ValueError(f"{package} is missing: pip install 'hf-rnn[onnx]'")
    model = load(arguments.checkpoint).float()
    if not isinstance(model, RecurrentPreTrainedModel):
        raise ValueError(f"checkpoint: expected one of this package's models, got a {type(model).__name__}")
    to_onnx(model, arguments.file, arguments.padding)
    worst = compare(StatefulModel(model, arguments.padding), Session(arguments.file))
    if not worst <= TOLERANCE:
        raise ValueError(f"file: expected torch's outputs to {TOLERANCE:.0e} (relative RMS error), got {worst:.1e}")
    print(f"saved {arguments.file}, equal to torch to {worst:.1e} (relative RMS error)")
