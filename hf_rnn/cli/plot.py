"""A picture of a run's losses."""

from pathlib import Path


def plot_losses(log_history: list[dict], path: str | Path, what: str = "loss (nats per token)") -> Path | None:
    """Draw training and held-out loss over steps; None where matplotlib is missing."""
    axes = _axes()
    if axes is None:
        return None
    for key, label, marker in (("loss", "training", None), ("eval_loss", "held out", "o")):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
            axes.legend()
    return _save(axes, "optimizer step", path, what)


def plot_positions(losses: dict[int, float], trained: int | None, path: str | Path) -> Path | None:
    """Draw the loss (nats per token) over the distance from the start, of `hf_rnn.tasks.evaluation.loss_by_position`;
    None where matplotlib is missing.

    Args:
        trained: the length of the sequences that the model was trained on, which a line marks.
    """
    axes = _axes()
    if axes is None:
        return None
    axes.plot(list(losses), list(losses.values()), marker="o")
    axes.set_xscale("log", base=2)
    if trained is not None:
        axes.axvline(trained, color="grey", linestyle="--", label="trained on")
        axes.legend()
    return _save(axes, "tokens since the start", path)


def check_picture(path: str | Path, name: str = "positions") -> None:
    """Raise ValueError, in which the argument has this name, for a path that no picture can be written to."""
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.absolute().parent.is_dir():
        raise ValueError(f"{name}: expected a .png, .svg or .pdf in an existing folder, got {path}")


def _axes():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture of the losses: pip install matplotlib")
        return None
    return Figure(figsize=(7, 4), layout="constrained").subplots()


def _save(axes, across: str, path: str | Path, what: str = "loss (nats per token)") -> Path:
    axes.set_xlabel(across)
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    axes.figure.savefig(path, dpi=120)
    return Path(path)
