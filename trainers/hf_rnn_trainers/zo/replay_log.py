"""The log of a run: what each step took from its losses, from which anyone with the base weights has the result."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_rnn_trainers.reliability.manifest import was_accepted

NAME = "zo_replay.jsonl"
# Settings that a run may go on with others of: a step's line tells what the optimizer had
_OF_A_STEP = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
_TOLD = (int, float, str, tuple, type(None))  # options of an optimizer's groups that decide what it does


class Step(NamedTuple):
    """A step's number, learning rates, options of the optimizer's groups (empty: as before), and coefficients c."""

    number: int
    rates: list[float]
    groups: list[dict[str, Any]]
    coefficients: Tensor


class ReplayLog:
    """A file with a line of settings and a line for each step, from the first on; where steps were made that it cannot
    tell of, a last line says why. Each checkpoint has a copy of the log so far.

    Args:
        path: the file; one that is there is replaced.
        header: settings, by which steps become weights again.
        checkpoint: that the run goes on from, with its log; None: it begins.

    Attributes:
        ended: why the log cannot be replayed to the run's weights; None if it can.
    """

    def __init__(self, path: Path, header: dict[str, Any], checkpoint: Path | None):
        self.path = path
        self.ended: str | None = None
        self._groups: list[dict[str, Any]] | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            self._put([json.dumps(header)])
            return
        self.take(checkpoint)
        if self.ended:
            return
        before, now = json.loads(self._lines()[0]), json.loads(json.dumps(header))
        other = [name for name in now if name not in _OF_A_STEP and now[name] != before.get(name)]
        if other:
            changes = ", ".join(f"{name}={now[name]!r} instead of {before.get(name)!r}" for name in other)
            self.end(f"{checkpoint} was gone on from with {changes}")

    def take(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's log."""
        before = checkpoint / NAME
        if not before.is_file():
            self._put([])
            self.end(f"{checkpoint}, which the weights go back to, has no log")
            return
        self._put(before.read_text().splitlines())
        self.ended = json.loads(self._lines()[-1]).get("ended")
        if self.ended is None and was_accepted(checkpoint):
            self.end(f"{checkpoint} was changed after it was saved, and accepted")

    def append(self, number: int, groups: list[dict[str, Any]], coefficients: Tensor) -> None:
        """A step, before the optimizer's `groups` get the learning rates of the next."""
        if self.ended:
            return
        c = base64.b64encode(coefficients.cpu().numpy().astype("<f4").tobytes()).decode()
        line: dict[str, Any] = {"step": number, "lr": [float(group["lr"]) for group in groups], "c": c}
        options = [{name: x for name, x in group.items() if isinstance(x, _TOLD) and name != "lr"} for group in groups]
        if options != self._groups:
            line["groups"] = self._groups = options
        self._append(line)

    def end(self, reason: str) -> None:
        """Say that the steps from here on are not told."""
        self.ended = reason
        self._append({"ended": reason})

    def copy_to(self, folder: Path) -> None:
        if folder.resolve() != self.path.parent.resolve():
            shutil.copyfile(self.path, folder / NAME)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def _put(self, lines: list[str]) -> None:
        new = self.path.with_name(f"{self.path.name}.new")  # the old one stays until this one is whole
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self.path)


def read(path: str | Path) -> tuple[dict[str, Any], list[Step]]:
    """The header, and every step; all is looked at before the first is made.

    Raises:
        ValueError: no such log, one with steps missing, or one that does not tell of all steps.
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        if lines and "ended" in lines[-1]:
            raise ValueError(f"does not lead to the weights of its run: {lines[-1]['ended']}")
        if not lines or "directions" not in lines[0]:
            raise ValueError("is no replay log of a ZOTrainer")
        return lines[0], [_step(expected, line) for expected, line in enumerate(lines[1:])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"log: {path}: {error}") from error


def _step(expected: int, line: dict[str, Any]) -> Step:
    if line["step"] != expected:
        raise ValueError(f"has step {line['step']} where step {expected} should be")
    c = torch.frombuffer(bytearray(base64.b64decode(line["c"])), dtype=torch.float32)
    return Step(expected, line["lr"], line.get("groups") or [{} for _ in line["lr"]], c)
