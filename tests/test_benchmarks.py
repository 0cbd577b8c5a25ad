"""What the benchmarks are made of: who is wrong is not timed, ratios, the guard, runs that go on, the page."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_wrong_and_the_failing_are_not_timed():
    from driver import compare

    x = torch.ones(4)
    calls = []

    def failing():
        raise RuntimeError("no such kernel")

    def wrong():
        calls.append(1)
        return [x * 1.01]

    rows = compare({"ours": lambda: [x], "wrong": wrong, "failing": failing, "other": lambda: None}, [x.double()])
    assert rows["ours"]["ratio"] == 1 and rows["ours"]["error"] == 0
    assert rows["wrong"]["refused"] == "wrong: relative error 1.00e-02 > 1e-04" and "ms" not in rows["wrong"]
    assert len(calls) == 2  # once to check, once for its memory
    assert rows["failing"]["refused"] == "failed: RuntimeError: no such kernel"
    assert rows["other"]["other_work"] and rows["other"]["ratio"] > 0


def test_nan_is_wrong():
    from driver import compare

    rows = compare({"ours": lambda: [torch.tensor([float("nan")])]}, [torch.ones(1)])
    assert "refused" in rows["ours"]


def test_a_reference_for_each():
    from driver import measure

    rows = measure(
        {"one": lambda: [torch.ones(1)], "two": lambda: [torch.full((1,), 2.0)]},
        {"one": [torch.ones(1)], "two": [torch.ones(1)]},
    )
    assert "times" in rows["one"] and "refused" in rows["two"]


def test_ratios_are_of_the_same_round():
    """A machine that halves its speed in the middle changes no ratio."""
    from driver import ratios

    rows = {
        "ours": {"times": [1.0, 1.0, 2.0, 2.0]},
        "peer": {"times": [3.0, 3.0, 6.0, 6.0]},
        "fast": {"times": [0.5, 0.5, 1, 1]},
    }
    summary = ratios(rows, "ours", {"fast": "why", "peer": "never said"})
    assert [row["ratio"] for row in summary.values()] == [1, 3, 0.5]
    assert summary["fast"]["accepted"] == "why" and "accepted" not in summary["peer"]


def test_the_first_call_is_the_one_that_is_checked():
    """A decoder's next token is another."""
    from driver import measure

    steps = iter(range(100))
    row = measure({"decoder": lambda: [torch.tensor([next(steps) + 1.0])]}, [torch.tensor([1.0])], repeats=3)["decoder"]
    assert row["error"] == 0 and "times" in row


def test_peak_of_tensors():
    from driver import peak_bytes

    from hf_rnn_kernels.arrays import empty

    def run():
        x = torch.empty(2**18)  # 1 MiB
        y = torch.empty(2**18)
        del x, y
        torch.empty(2**18)

    assert peak_bytes(run) == 2 * 2**20
    assert peak_bytes(lambda: empty(2**24)[:0]) == 2**26  # which is in memory of ours


def test_compilations_are_counted():
    pytest.importorskip("numba")
    import numba
    from driver import compilations

    @numba.njit
    def twice(x):
        return 2 * x

    with compilations() as first:
        twice(1)
    with compilations() as again:
        twice(2)
    assert first and not again


def test_the_guard_names_what_got_worse():
    from suite import worse

    def result(peer: float | None, extra: dict | None = None) -> dict:
        row = {"refused": "failed"} if peer is None else {"ratio": peer}
        return {"8 x 512": {"hf_rnn": {"ratio": 1.0}, "peer": row, **(extra or {})}}

    def lines(before: dict, after: dict) -> list[str]:
        return list(worse({"results": before}, {"results": after}).values())

    assert lines(result(3.0), result(2.6)) == []
    assert lines(result(3.0), result(2.5)) == ["8 x 512 / peer: 3.00 times ours, now 2.50, 17% worse"]
    assert lines(result(3.0), result(9.0)) == []
    assert lines(result(3.0), result(None)) == ["8 x 512 / peer: was 3.00 times ours, now not measured"]
    assert len(lines(result(3.0), {})) == 2
    assert lines(result(None), result(2.0)) == []
    compiled = [result(3.0, {"hf_rnn, compiled": {"ratio": ratio}}) for ratio in (0.4, 0.3, 0.5)]
    assert lines(compiled[0], compiled[1]) == []
    assert lines(compiled[0], compiled[2]) == ["8 x 512 / hf_rnn, compiled: 0.40 times ours, now 0.50, 20% worse"]
    noisy = {
        "results": result(3.0),
        "other_runs": [{"ratios": {"8 x 512 / peer": ratio}} for ratio in (2.5, 4.0, None)],
    }
    assert worse(noisy, {"results": result(2.2)}) == {}  # within 15% of a run that is remembered
    assert list(worse(noisy, {"results": result(2.1)})) == ["8 x 512 / peer"]
    alone = {"hf_rnn": {"ratio": 1.0}, "peer": {"refused": "left out"}}
    wrong = {"hf_rnn": {"refused": "wrong"}, "peer": {"refused": "left out"}}
    assert lines({"a: b": alone}, {"a: b": wrong}) == ["a: b / hf_rnn: was 1.00 times ours, now not measured"]


def test_a_results_file_remembers_the_ratios_of_four_runs_before(tmp_path, monkeypatch):
    import driver

    monkeypatch.setattr(driver, "RESULTS", tmp_path)
    for ratio in range(7):
        path = driver.save("question", {"t": {"ours": {"ratio": 1.0}, "peer": {"ratio": ratio}}, "seconds": 1.0})
    record = json.loads(path.read_text())
    assert [run["ratios"]["t / peer"] for run in record["other_runs"]] == [5, 4, 3, 2]
    assert set(record["other_runs"][0]) == {"date", "commit", "ratios"}
    path.write_text(json.dumps(record | {"device": "another"}))
    driver.save("question", {"seconds": 1.0})
    driver.save("question", {"seconds": 1.0})
    assert "other_runs" not in json.loads(path.read_text())


def test_check_measures_elsewhere_and_again(tmp_path, monkeypatch):
    """A question that is worse each time, one that is worse twice, one each time in another row, one that is not."""
    import driver

    for path in BENCHMARKS.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    script = """
import json, os, sys
from pathlib import Path

here = Path(__file__)
count = len(list(here.parent.glob(f"{here.stem}-*.run")))
here.with_name(f"{here.stem}-{count}.run").touch()
record = json.loads((here.parent / "results" / f"{here.stem}_cpu.json").read_text())
for (row, entry), ratio in zip(record["results"].items(), RATIOS[count], strict=True):
    entry["peer"]["ratio"] = ratio
(Path(os.environ["HF_RNN_RESULTS"]) / f"{here.stem}_cpu.json").write_text(json.dumps(record))
"""
    questions = {
        "bad": ([1], [1], [1]),
        "unlucky": ([1], [1], [3]),
        "noisy": ([1, 3, 3], [3, 1, 3], [3, 3, 1]),
        "good": ([3],),
    }
    monkeypatch.setattr(driver, "RESULTS", tmp_path / "results")
    for name, ratios in questions.items():
        (tmp_path / f"{name}.py").write_text(f"RATIOS = {ratios}\n{script}")
        driver.save(name, {f"a: {n}": {"ours": {"ratio": 1}, "peer": {"ratio": 3}} for n in range(len(ratios[0]))})
    committed = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    command = [sys.executable, str(tmp_path / "suite.py"), "check", "--questions", *questions]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout.endswith("Worse by more than 15%:\nbad: a: 0 / peer: 3.00 times ours, now 1.00, 67% worse\n")
    assert {path.name: path.read_text() for path in (tmp_path / "results").iterdir()} == committed
    assert len(list(tmp_path.glob("good-*.run"))) == 1


RUNS = """
import sys
from pathlib import Path

from resumable import finish, run_all

def run(n):
    folder = Path(sys.argv[1])
    (folder / f"{n}.times").open("a").write("x")
    if n == 2 and not (folder / "mended").exists():
        raise RuntimeError("interrupted")
    return {"square": n * n}

if __name__ == "__main__":
    results = run_all("squares", run, {f"of {n}": (n,) for n in range(4)})
    print([row["square"] for row in results.values()], list(results))
    finish("squares")
"""


def test_runs_go_on_where_they_were(tmp_path):
    """Done runs are not done again; the results come in order; nothing is left over."""
    (tmp_path / "squares.py").write_text(RUNS)
    environment = os.environ | {"HF_RNN_RESULTS": str(tmp_path / "results"), "PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, str(tmp_path / "squares.py"), str(tmp_path)]
    (tmp_path / "results").mkdir()
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode != 0 and "interrupted" in first.stderr
    partial = json.loads((tmp_path / "results" / "squares_cpu.partial.json").read_text())["runs"]
    assert partial and "of 2" not in partial
    (tmp_path / "mended").touch()
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.stdout.strip() == "[0, 1, 4, 9] ['of 0', 'of 1', 'of 2', 'of 3']", second.stderr
    for name in partial:
        assert (tmp_path / f"{name[-1]}.times").read_text() == "x"
    assert list((tmp_path / "results").iterdir()) == []


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Begins the same question again, as another call of its benchmark does."""
    import driver
    import resumable

    monkeypatch.setattr(driver, "RESULTS", tmp_path)
    monkeypatch.setattr(driver, "LOST", set())
    monkeypatch.setattr(resumable, "sources", lambda: "these")
    return lambda: resumable.Parts("question")


def test_parts_go_on_where_they_were(parts, tmp_path):
    """What is done is not done again; what fails does not stop the others, and is tried once more."""
    calls = []

    def part(n):
        calls.append(n)
        return {"square": n // (n - 2)}

    for _ in range(3):
        question = parts()
        results = {str(n): question.run(str(n), part, n) for n in range(4)}
        assert results["2"] is None and results["3"] == {"square": 3}
        with pytest.raises(SystemExit) as end:
            question.finish(results)
        assert end.value.code == 1
    assert calls == [0, 1, 2, 3, 2]
    saved = json.loads((tmp_path / "question_cpu.json").read_text())["results"]
    assert saved["failed"] == {"2": "given up after 2 tries"}
    mended = parts()
    mended.saved["runs"]["2"] = {"result": {"square": 4}, "commit": "another"}
    mended.finish({str(n): mended.run(str(n), part, n) for n in range(4)})
    assert [path.name for path in tmp_path.iterdir()] == ["question_cpu.json"]
    saved = json.loads((tmp_path / "question_cpu.json").read_text())["results"]
    assert saved["at_other_commits"] == {"2": "another"} and "failed" not in saved


def test_who_takes_the_device_is_left_out(parts, monkeypatch):
    """An illegal address in a peer's kernel ends the process; the next one measures all but that peer."""
    import driver
    import resumable

    def breaking():
        monkeypatch.setattr(driver, "device_is_lost", lambda: True)
        raise RuntimeError("illegal memory access")

    def part():
        x = torch.ones(1)
        return driver.compare({"hf_rnn": lambda: [x], "peer": breaking, "other": lambda: [x]}, [x], repeats=1)

    with pytest.raises(SystemExit) as end:
        parts().run("part", part)
    assert end.value.code == resumable.AGAIN
    monkeypatch.setattr(driver, "device_is_lost", lambda: False)
    rows = parts().run("part", part)
    assert rows["peer"]["refused"].startswith("left out") and rows["other"]["ms"] > 0


def test_a_step_on_a_gpu_ends_in_time_and_a_crash_is_gone_over(tmp_path, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "HERE", tmp_path)
    (tmp_path / "slow.py").write_text(
        "import subprocess, sys, time\nfrom pathlib import Path\n"
        "args = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "Path(__file__).with_suffix('.pid').write_text(str(subprocess.Popen(args).pid))\ntime.sleep(60)\n"
    )
    assert gpu.run(["slow"], 0.5) == "stopped"
    begun, ended = time.perf_counter(), False
    while not ended and time.perf_counter() - begun < 20:  # what it started ends with it
        process = Path(f"/proc/{(tmp_path / 'slow.pid').read_text()}/stat")
        ended = not process.exists() or process.read_text().split()[2] == "Z"
    assert ended
    (tmp_path / "crash.py").write_text(
        "import os, sys\nfrom pathlib import Path\npath = Path(__file__).with_suffix('.times')\n"
        "path.open('a').write('x')\nif len(path.read_text()) < 3:\n    os.kill(os.getpid(), 11)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    assert gpu.run(["crash", "0"], 60) == "done"
    assert gpu.run(["crash", "3"], 60) == "failed (3)"


@pytest.mark.slow
def test_a_rehearsal_without_a_gpu(tmp_path, monkeypatch, capsys):
    import driver
    import gpu

    monkeypatch.setattr(driver, "RESULTS", tmp_path)
    for name, value in dict(HF_RNN_DRY="1", TRITON_INTERPRET="1", HF_RNN_RESULTS=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    assert gpu.run_steps(["layers"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:2] in ("a ", "b ", "c ", "d ", "e ")]
    assert len(lines) == 12 and sum(" not run " in line for line in lines) == 11
    assert lines[2].startswith("b layers ") and " done " in lines[2] and "2 tables, 0 without ours" in lines[2]
    assert json.loads((tmp_path / "gpu_steps_cpu.json").read_text())["results"]["layers"]["state"] == "done"


def test_wheels_for_a_gpu_are_pinned():
    """And none of them brings a torch."""
    names = [line for line in (BENCHMARKS / "gpu-wheels.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert [name for name in names if "==" not in name and name.lower() not in pinned] == []
    assert not {name.partition("==")[0] for name in names} & {"torch", "triton", "transformers"}


def test_models_are_of_equal_size():
    from models import MODELS, width

    with torch.device("meta"):
        for parameters in (350_000, 1_000_000):
            for name, make in MODELS.items():
                model = make(width(name, parameters, 256), vocab_size=256)
                assert model.num_parameters() == pytest.approx(parameters, rel=0.09), name


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_taggers_are_of_equal_size(direction):
    pytest.importorskip("sklearn")
    from tagging import CONTESTANTS, PARAMETERS, make

    with torch.device("meta"):
        sizes = {name: make(name, direction).num_parameters() for name in CONTESTANTS}
    assert sizes == {name: pytest.approx(PARAMETERS, rel=0.06) for name in sizes}


def test_the_page_is_what_the_results_make():
    import page

    assert page.PAGE.read_text() == page.page(), "make performance"
    assert page.README.read_text() == page.readme(), "make performance"


def test_no_peer_is_faster_without_a_reason():
    import page

    assert [row for row in page.faster_peers() if row[-1] == "NOT ACCEPTED"] == []
