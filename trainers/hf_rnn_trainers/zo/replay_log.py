"""The log of a run: what each step took from its losses, from which anyone with the base weights has the result."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "zo_replay.jsonl"


class ReplayLog:
    """A file with a line of settings and a line for each step: its number, learning rates and coefficients c.

    Args:
        path: the file; what it has of steps from `start` on is dropped, all else is kept.
        header: settings, by which steps become weights again.
        start: the first step to be written.
    """

    def __init__(self, path: Path, header: dict[str, Any], start: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[str] = []
        if start > 0 and path.exists():
            kept = path.read_text().splitlines()[1 : start + 1]
        new = path.with_name(f"{path.name}.new")  # the old one stays until this one is whole
        new.write_text("".join(f"{line}\n" for line in [json.dumps(header), *kept]))
        new.replace(path)

    def append(self, step: int, rates: list[float], coefficients: Tensor) -> None:
        c = base64.b64encode(coefficients.cpu().numpy().astype("<f4").tobytes()).decode()
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "lr": rates, "c": c}) + "\n")


def read(path: str | Path) -> tuple[dict[str, Any], Iterator[tuple[int, list[float], Tensor]]]:
    """The header, and (step, learning rates, coefficients) of every step.

    Raises:
        ValueError: no such log, or one with steps missing.
    """
    lines = Path(path).read_text().splitlines()
    header = json.loads(lines[0]) if lines else {}
    if "directions" not in header:
        raise ValueError(f"log: {path} is no replay log of a ZOTrainer")

    def steps() -> Iterator[tuple[int, list[float], Tensor]]:
        for expected, line in enumerate(lines[1:]):
            entry = json.loads(line)
            if entry["step"] != expected:
                raise ValueError(f"log: {path} has step {entry['step']} where step {expected} should be")
            yield expected, entry["lr"], torch.frombuffer(bytearray(base64.b64decode(entry["c"])), dtype=torch.float32)

    return header, steps()
