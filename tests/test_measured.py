"""What README and docs say was measured stands in a section that names the benchmark, which has committed results.

Which number belongs to which row of which file is for its reader to see: a look-up by value alone takes most invented
numbers for true ones (docs/log.md, 2026-11-29).
"""

import re
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
# What only a measurement gives
MEASURED = re.compile(
    r"\d[\d,.]*(?:e-\d+)? ?"
    r"(?:ms\b|us\b|s\b|seconds\b|minutes\b|min\b|[KMG]i?B\b|[KMG]B/s|times (?:as|faster|slower|less|more)|x as)"
)


def sections(text: str) -> list[str]:
    """The text between headings, without code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.split(r"^#+ .*$", text, flags=re.MULTILINE)


def prose(section: str) -> str:
    """Without inline code, targets of links and papers' numbers."""
    section = re.sub(r"`[^`]*`", " ", section)
    section = re.sub(r"\]\([^)]*\)", "]", section)
    return re.sub(r"\[?\d{4}\.\d{5}\]?", " ", section)


def questions(section: str) -> set[str]:
    return set(re.findall(r"benchmarks/(?:results/)?(\w+?)(?:_cpu|_gpu)?\.(?:py|json)", section))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_was_measured_names_its_benchmark(path):
    for section in sections(path.read_text()):
        named = questions(section)
        assert {name for name in named if not (BENCHMARKS / f"{name}.py").exists()} == set()
        measured = [found.group() for found in MEASURED.finditer(prose(section))]
        results = [name for name in named if list((BENCHMARKS / "results").glob(f"{name}_[cg]pu.json"))]
        assert results or not measured, measured
