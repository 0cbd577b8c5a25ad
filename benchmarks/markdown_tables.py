"""Numbers and tables as docs/performance.md has them."""

import math
import statistics
from collections.abc import Callable
from typing import Any

Results = dict[str, Any]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(x: float, digits: int = 3) -> str:
    """So many significant digits, none before the point dropped."""
    if x == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:,.{places}f}"


def mean_and(worst: Callable[[list[float]], float], runs: list[Results], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{statistics.mean(values):.3f} ({worst(values):.3f})"
