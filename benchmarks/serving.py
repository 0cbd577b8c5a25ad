"""Many texts at once: tokens a second, ten thousand sessions, and the wait beside a long prompt.

    python benchmarks/serving.py

Models of 1 million parameters, random weights, greedy, on a CPU. `ContinuousBatch`, which `generate_batch` and the
server use, beside `generate()` one text after the other, `generate()` with all as one batch, and transformers' Mamba in
one batch: 1 to 512 texts, prompts of 8 tokens; new tokens a second are rows times tokens over the time. Sessions: the
server's store, 10,000 of one key, begun, parked as files, and taken back; bytes by the shapes of the states, by the
files, and by the process. A long prompt: the time between the tokens of one text, alone and while 100,000 tokens are
read beside it, over the tokens of prompts that each step reads.
"""

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from driver import GPU, RESULTS, compare, save, sized, table
from models import make

import hf_rnn  # noqa: F401, registers the architectures
from hf_rnn.generation.batching import ContinuousBatch, Request
from hf_rnn.serving.limits import Limits, owner_of
from hf_rnn.serving.sessions import Sessions

PARAMETERS = sized(1_000_000, 1_000_000, 40_000)
NAMES = ("minGRU", "LSTM", "xLSTM")
NEW_TOKENS = sized({1: 64, 8: 64, 64: 32, 512: 16}, {1: 64, 8: 64, 64: 32, 512: 16}, {1: 4, 3: 4})
PROMPT, SESSIONS, LONG = 8, sized(10_000, 10_000, 20), sized(100_000, 100_000, 200)
PIECES = sized((64, 512, 2048), (64, 512, 2048), (7,))
OPTIONS: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def batched(model, prompts: torch.Tensor, new: int) -> list[list[int]]:
    batch = ContinuousBatch(model, max_rows=len(prompts))
    requests = [batch.add(Request(prompt, new)) for prompt in prompts.tolist()]
    while batch.busy:
        batch.step()
    return [request.tokens for request in requests]


def one_by_one(model, prompts: torch.Tensor, new: int) -> list[list[int]]:
    return [model.generate(row[None], max_new_tokens=new, **OPTIONS)[0, PROMPT:].tolist() for row in prompts]


def together(model, prompts: torch.Tensor, new: int) -> list[list[int]]:
    return model.generate(prompts, max_new_tokens=new, **OPTIONS)[:, PROMPT:].tolist()


def throughput(name: str, rows: int, new: int) -> dict[str, dict]:
    torch.manual_seed(0)
    model, mamba = (make(other, PARAMETERS, 256).eval() for other in (name, "Mamba (transformers)"))
    prompts = torch.randint(0, 256, (rows, PROMPT))
    contestants = {
        "hf_rnn, ContinuousBatch": partial(batched, model),
        "hf_rnn, generate() one by one": partial(one_by_one, model),
        "hf_rnn, generate() as one batch": partial(together, model),
        "Mamba (transformers), one batch": partial(together, mamba),
    }
    ours = list(contestants.values())[:3]
    texts = [run(prompts, new) for run in ours]  # in float32, in which a near tie may part two texts
    same = min(sum(a == b for a, b in zip(texts[0], other, strict=True)) for other in texts[1:])

    def nothing(run) -> None:
        run(prompts, new)

    results = compare({label: partial(nothing, run) for label, run in contestants.items()}, repeats=5, seconds=4)
    for row in results.values():
        if "ms" in row:
            row["tokens_a_second"] = 1e3 * rows * new / row["ms"]
    results["hf_rnn, ContinuousBatch"]["same_texts"] = same / rows
    table(f"{name}, {rows} texts, {new} new tokens each", results)
    print("  tokens a second: " + ", ".join(f"{row.get('tokens_a_second', 0):,.0f}" for row in results.values()))
    return results


def sessions(name: str) -> dict[str, float]:
    """In a process of its own, which has no memory left over from other work."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(begun_and_parked(name, Path(folder)))


async def begun_and_parked(name: str, folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    model, process, owner = make(name, PARAMETERS, 256).eval(), psutil.Process(), owner_of("benchmark")
    initial = ContinuousBatch(model, 1).initial_state()
    formula = sum(x[0].numel() * x.element_size() for state in initial.states for x in state or ())
    store = Sessions(model, initial, folder, Limits(max_sessions=SESSIONS))
    await store.begin(owner, "first")
    await store.park_all()  # the fingerprint, once
    before, start = process.memory_info().rss, time.perf_counter()
    for n in range(SESSIONS - 1):
        session = await store.begin(owner, f"session {n}")
        store.go_on(session, session.state, [n % 256])
    begun, after = time.perf_counter(), process.memory_info().rss
    assert await store.park_all() == 0
    parked = time.perf_counter()
    store.memory.clear()
    times = []
    for n in range(0, SESSIONS - 1, max(SESSIONS // 200, 1)):
        at = time.perf_counter()
        store.give_back(await store.take(owner, f"session {n}"))
        times.append(1e3 * (time.perf_counter() - at))
    at = time.perf_counter()
    listed = len(await store.listed(owner))
    found = {
        "sessions": SESSIONS,
        "bytes_by_formula": formula,
        "bytes_in_memory": (after - before) / (SESSIONS - 1),
        "bytes_of_a_file": statistics.median(path.stat().st_size for path in folder.glob("*/*.state")),
        "begin_ms": 1e3 * (begun - start) / SESSIONS,
        "park_ms": 1e3 * (parked - begun) / SESSIONS,
        "take_back_ms": statistics.median(times),
        "list_all_seconds": time.perf_counter() - at,
    }
    assert listed == SESSIONS
    print(f"\n{name}, {SESSIONS:,} sessions\n  " + ", ".join(f"{key} {value:,.3f}" for key, value in found.items()))
    return found


def waits(name: str, piece: int) -> dict[str, float]:
    """Milliseconds between the tokens of one text: alone, and while a long prompt is read."""
    torch.manual_seed(0)
    batch = ContinuousBatch(make(name, PARAMETERS, 256).eval(), 4, piece)
    text = batch.add(Request([1], 10**9))
    for _ in range(20):
        batch.step()

    def between(go_on) -> list[float]:
        times, last = [], time.perf_counter()
        while go_on(len(times)):
            tokens = len(text.tokens)
            batch.step()
            assert len(text.tokens) == tokens + 1
            times.append(1e3 * (time.perf_counter() - last))
            last = time.perf_counter()
        return times

    alone = between(lambda n: n < 500)
    prompt = batch.add(Request(torch.randint(0, 256, (LONG,)).tolist(), 0))
    beside = between(lambda n: prompt.finish_reason is None)
    found = {
        "alone_median": statistics.median(alone),
        "alone_max": max(alone),
        "beside_median": statistics.median(beside),
        "beside_max": max(beside),
        "prompt_tokens_a_second": LONG / sum(beside) * 1e3,
    }
    print(f"{name}, {piece} tokens of prompts a step: " + ", ".join(f"{k} {v:,.3f}" for k, v in found.items()))
    return found


def picture(results: dict) -> None:
    """New tokens a second over the number of texts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(NAMES), sharey=True, squeeze=False)[0], NAMES, strict=True):
        rows = results["throughput"][name]
        for label in next(iter(rows.values())):
            points = [(int(n), row[label].get("tokens_a_second")) for n, row in rows.items()]
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(title=f"{name}, 1M parameters", xlabel="texts at once", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="new tokens a second")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(RESULTS / f"serving_{'gpu' if GPU else 'cpu'}.png", dpi=100)


def main() -> None:
    results: dict[str, Any] = {"throughput": {}, "sessions": {}, "waits": {}}
    for name in NAMES:
        results["throughput"][name] = {str(rows): throughput(name, rows, new) for rows, new in NEW_TOKENS.items()}
    for name in NAMES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results["sessions"][name] = pool.submit(sessions, name).result()
    for name in NAMES:
        results["waits"][name] = {str(piece): waits(name, piece) for piece in PIECES}
    save("serving", results)
    picture(results)


if __name__ == "__main__":
    main()
