"""A picture of a run's losses."""

from pathlib import Path


def plot_losses(log_history: list[dict], path: str | Path) -> Path | None:
    """Draw training and held-out loss (nats per token) over steps; None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture of the losses: pip install matplotlib")
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, marker in (("loss", "training", None), ("eval_loss", "held out", "o")):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
            axes.legend()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    path = Path(path)
    figure.savefig(path, dpi=120)
    return path
