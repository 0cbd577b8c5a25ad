"""Processes of a test: torchrun on this machine, one thread each."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(processes: int, script: Path, *arguments: str | Path, timeout: int = 280) -> None:
    """Run `script` in so many gloo processes, or one by itself; what any of them raises fails the test."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    paths = [TESTS.parent, TESTS.parent / "kernels", TESTS.parent / "trainers", TESTS, TESTS / "trainers"]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    assert result.returncode == 0, result.stderr[-9000:]
