"""What `make demo` reaches and how long it takes, set-up aside.

python benchmarks/demo.py
"""

import re
import subprocess
import sys
import tempfile
import time

from driver import save

ROW = r"^  (lzma|byte n-gram, order \d|this minGRU|and learning on the way) +([\d.]+)"


def main() -> None:
    start, text = time.perf_counter(), ""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_rnn.cli.demo", "--output_dir", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                text += line
    if process.returncode:
        sys.exit(process.returncode)
    seconds = time.perf_counter() - start
    steps = re.search(r"([\d.]+) s a step: (\d+) steps", text)
    assert steps is not None
    held_out = dict(re.findall(ROW, text, re.MULTILINE))
    results = {
        "seconds": seconds,
        "seconds_per_step": float(steps[1]),
        "steps": int(steps[2]),
        "held-out bits per byte": {name: float(bits) for name, bits in held_out.items()},
    }
    print(results)
    save("demo", results)


if __name__ == "__main__":
    main()
