"""The tests marked `gpu`, each result kept as it comes: what passed at these sources is not run again.

python benchmarks/gpu_tests.py [files, pytest's own options]
"""

import os
import sys
from pathlib import Path

import pytest
from driver import DRY, save
from resumable import read_partial, sources, write_partial

TESTS = Path(__file__).resolve().parents[1] / "tests"
WORKERS = "0" if DRY else str(min(8, os.cpu_count() or 1))  # kernels compile side by side


class Kept:
    """Writes down what became of every test; on later calls those that passed are left out."""

    def __init__(self):
        self.saved = read_partial("gpu_tests")
        if self.saved.get("sources") != sources():
            self.saved |= {"sources": sources(), "runs": {}}
        self.runs = self.saved["runs"]

    def passed(self) -> list[str]:
        """Those with parameters: pytest deselects by what names begin with, and no name goes on after a "]"."""
        return [name for name, run in self.runs.items() if run["outcome"] == "passed" and name.endswith("]")]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":  # a setup that fails or skips, a call, a bad teardown
            said = report.longreprtext[-2000:] if report.failed else ""
            self.runs[report.nodeid] = {"outcome": report.outcome, "seconds": report.duration, "said": said}
            write_partial("gpu_tests", self.saved)


def main() -> int:
    kept = Kept()
    left_out = [f"--deselect={name}" for name in kept.passed()]
    sys.path.remove(str(Path(__file__).parent))  # where other packages' names are
    options = ["-m", "gpu", "-q", "--tb=short", "-n", WORKERS, "-p", "no:cacheprovider"]
    if not DRY:  # what hangs is ended with its process, and another takes over
        options += ["--timeout=150", "--timeout-method=thread"]
    options += ["--continue-on-collection-errors", *left_out]
    code = pytest.main([*options, *(sys.argv[1:] or map(str, (TESTS / "gpu", TESTS / "ops")))], plugins=[kept])
    save("gpu_tests", {"tests": kept.runs})
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
