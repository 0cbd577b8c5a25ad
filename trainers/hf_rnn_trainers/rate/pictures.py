"""What the rate term did to a model, as a picture."""

from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from hf_rnn_kernels.coding import GeneralizedGaussian

logger = logging.get_logger(__name__)


def draw_rate(log_history: list[dict], weights: dict[str, Tensor], path: Path) -> Path | None:
    """Bits over steps, loss against bits, and the histograms of the largest tensors beside their fitted densities.

    Args:
        log_history: Trainer's, with `coded_bits`.
        weights: the constrained tensors.
        path: where to.

    Returns:
        The path; None where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture of the rate: pip install matplotlib")
        return None
    points = [entry for entry in log_history if "coded_bits" in entry]
    largest = sorted(weights.items(), key=lambda item: -item[1].numel())[:6]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.subplots(2, 4).flatten()
    steps = [entry["step"] for entry in points]
    for name, label in (("coded_bits", "entropy when quantised"), ("estimated_bits", "of the fitted density")):
        grid[0].plot(steps, [entry[name] for entry in points], label=label)
    grid[0].set(xlabel="optimizer step", ylabel="bits per weight")
    zeros = grid[0].twinx()
    zeros.plot(steps, [entry["zeros"] for entry in points], color="grey", linestyle=":", label="zeros")
    zeros.set(ylabel="share of exact zeros", ylim=(0, 1))
    grid[0].legend()
    held_out = [entry for entry in log_history if "eval_loss" in entry]
    for entries, key, label in ((points, "loss", "training"), (held_out, "eval_loss", "held out")):
        pairs = [(_bits_at(points, e["step"]), float(e[key])) for e in entries if key in e and points]
        if pairs:
            grid[1].plot(*zip(*pairs, strict=True), marker=".", label=label)
            grid[1].legend()
    grid[1].set(xlabel="bits per weight", ylabel="loss", title="loss against rate, over the run")
    for axes, (name, w) in zip(grid[2:], largest, strict=False):
        density = GeneralizedGaussian.fit(w)
        limit = float(w.abs().max()) or 1.0
        axes.hist(w.flatten().numpy(), bins=101, range=(-limit, limit), density=True, log=True, color="C0", alpha=0.6)
        x = torch.linspace(-limit, limit, 402, dtype=torch.float64)
        axes.plot(x, density.log_density(x).exp(), color="C1", label=f"nu = {density.shape:.2f}")
        axes.set_ylim(bottom=0.2 / (w.numel() * 2 * limit / 101))
        axes.set_title(name.removeprefix("model."), fontsize=8)
        axes.legend(fontsize=8)
    for axes in grid[2 + len(largest) :]:
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _bits_at(points: list[dict], step: int) -> float:
    return min(points, key=lambda entry: abs(entry["step"] - step))["coded_bits"]
