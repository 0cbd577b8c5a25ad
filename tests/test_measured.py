"""Every measured number in README and docs stands in a results file, and the performance page is what these make."""

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
# The log tells of what was tried, mostly in runs that are not kept; the performance page is made from the results
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.name not in ("log.md", "performance.md")
]
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w]*[.]?\d)")
# What only a measurement gives
MEASURED = re.compile(
    r"\d[\d,.]*(?:e-\d+)? ?"
    r"(?:ms\b|us\b|s\b|seconds\b|minutes\b|min\b|[KMG]i?B\b|[KMG]B/s|times (?:as|faster|slower|less|more)|x as)"
)

# What no results file has as it stands here, and why
SIZE, SHEET = "a size, not a measurement", "published: NVIDIA's data sheet, FlashRNN's figures"
STATED = {
    "README.md": {"128": SIZE, "160": SIZE, "3.11": "a version"},
    "docs/architectures/gru.md": {"128": SIZE, "160": SIZE},
    "docs/architectures/lstm.md": {"160": SIZE},
    "docs/architectures/xlstm.md": {"160": SIZE},
    "docs/zero_order.md": {"4,096": SIZE},
    "docs/scaling.md": dict.fromkeys(["989", "0.4", "3.35", "450", "400", "50", "3.1", "8.8", "768"], SHEET),
    "docs/memory_training.md": {
        "1,484": "gradient_norms, BPTT: the last over the first",
        "16": "gradient_norms, SMT: the last beside the others",
        "480": "steps, 400 + 80",
    },
    "docs/reliability.md": {"50": "saves of one trainer; the file has the sum"},
    "docs/rate_constrained.md": {
        **dict.fromkeys(["0.312", "0.276", "0.240"], "differences of two of the rows' losses, on average"),
        **dict.fromkeys(["14", "40", "91"], "one minus a quotient of two of the file's numbers"),
        "3.23": "interpolated from the rows, at another share than the file has",
        "3.45": "a difference of two of the rows' losses, in bits",
        "13.6": "a quotient of two of the rows' losses",
        "1,000,000": SIZE,
    },
}


def sections(text: str) -> list[str]:
    """The text between headings, without code, links' targets and pictures."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.split(r"^#+ .*$", text, flags=re.MULTILINE)


def prose(section: str) -> str:
    """Without inline code, targets of links and papers' numbers."""
    section = re.sub(r"`[^`]*`", " ", section)
    section = re.sub(r"\]\([^)]*\)", "]", section)
    return re.sub(r"\[?\d{4}\.\d{5}\]?", " ", section)


@cache
def known(question: str) -> tuple[tuple[float, ...], str]:
    """Numbers of a results file, as they are, in percent, and in units a thousand times larger and smaller; and all
    text of it and of its benchmark, for sizes."""
    found: list[float] = []
    text = [(BENCHMARKS / f"{question}.py").read_text()]

    def look(value: object) -> None:
        if isinstance(value, dict):
            text.extend(map(str, value))
            for part in value.values():
                look(part)
        elif isinstance(value, list):
            for part in value:
                look(part)
        elif isinstance(value, str):
            text.append(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            x = abs(float(value))
            found.extend([x, 100 * x, x / 1000, 1000 * x])

    for path in sorted((BENCHMARKS / "results").glob(f"{question}_[cg]pu.json")):
        record = json.loads(path.read_text())
        record.pop("other_runs", None)
        look(record)
    return tuple(found), " ".join(text)


def stands_in(number: str, question: str) -> bool:
    """Whether a results file has this number, rounded as it is said here."""
    values, text = known(question)
    if re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", text):
        return True
    plain = number.replace(",", "")
    if re.search(rf"(?<![\d.]){re.escape(plain)}(?![\d]|[.]\d)", text.replace("_", "")):
        return True
    digits = len(plain.partition("e")[0].partition(".")[2])
    if "e" in plain:
        return any(f"{x:.{digits}e}" == f"{float(plain):.{digits}e}" for x in values)
    return any(abs(x - float(plain)) <= 0.5000001 * 10**-digits for x in values)


def questions(section: str) -> list[str]:
    return sorted(set(re.findall(r"benchmarks/(?:results/)?(\w+?)(?:_cpu|_gpu)?\.(?:py|json)", section)))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_measured_numbers_stand_in_results(path):
    missing, stated = [], STATED.get(str(path.relative_to(ROOT)), {})
    for section in sections(path.read_text()):
        sources = [name for name in questions(section) if (BENCHMARKS / f"{name}.py").exists()]
        text = prose(section)
        if not sources:
            missing += [f"no results file is named for {found.group()!r}" for found in MEASURED.finditer(text)]
            continue
        for found in NUMBER.finditer(text):
            if found.group() not in stated and not any(stands_in(found.group(), name) for name in sources):
                around = text[max(0, found.start() - 50) : found.end() + 30].replace("\n", " ")
                missing.append(f"{found.group()} in ...{around}... is not in the results of {sources}")
    assert not missing, "\n".join(missing)


def test_an_invented_number_is_found():
    """Of numbers near the measured ones, and of any with two decimals, most stand in no file."""
    invented = [f"{n}.{k}7" for n in range(1, 20) for k in range(10)]
    for question in ("training_step", "decoding", "recurrent"):
        assert sum(stands_in(number, question) for number in invented) < 0.25 * len(invented), question
    assert stands_in("1.79", "training_step") and not stands_in("1.81", "training_step")
