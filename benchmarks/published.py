"""What papers and projects publish, row by row, with what we get at the same thing; figures of theirs are facts.

Sources: minGRU and minLSTM, arXiv 2410.01201; FlashRNN, arXiv 2412.07752, and its README's plots (H100, bfloat16);
TFLA, the data in mlstm_kernels' notebooks (H100, bfloat16); xLSTM-7B, arXiv 2503.13427, the data in the same place;
CD-RGE, arXiv 2505.17852, its README (A40); SMT, 2026; BackSlash, arXiv 2504.16968.
"""

import statistics
from collections.abc import Callable
from typing import Any

Load = Callable[..., dict[str, Any] | None]
NO_GPU = "no GPU has run it yet: `make gpu`"


def published_rows(load: Load) -> list[list[str]]:
    """What, theirs, ours, and the benchmark that says so."""
    return [
        *_minimal(load),
        *_flash_rnn(load),
        *_gpu_only(load),
        *_xlstm_7b(load),
        *_zero_order(load),
        *_memories(load),
        *_rate(load),
    ]


def _results(load: Load, question: str) -> Any:
    record = load(question)
    return None if record is None else record["results"]


def _minimal(load: Load) -> list[list[str]]:
    results, rows = _results(load, "min_against_traditional"), []
    if results is None:
        return []
    by = "min_against_traditional.py"
    claims = {
        ("minGRU and GRU", "GRU", 512): "175 times as fast (T4)",
        ("minLSTM and LSTM", "LSTM", 512): "235 times (T4)",
        ("minGRU and GRU", "GRU", 4096): "over 1,300 times (T4)",
        ("minLSTM and LSTM", "LSTM", 4096): "over 1,300 times (T4)",
    }
    for (pair, cell, time), theirs in claims.items():
        found = results[f"{pair}: training step, {time} tokens, batch 64, width 64"]
        ours = ", ".join(f"{found[f'{cell}, {how}']['ratio']:.1f} times {how}" for how in ("step by step", "fused"))
        rows.append([f"{pair}: training step, {time} tokens", theirs, f"{ours} (2 cores)", by])
    for pair, theirs in (("minGRU and GRU", "87% fewer"), ("minLSTM and LSTM", "85% fewer")):
        sizes = results[f"{pair}: parameters, expansion 4"]
        fewer = 100 * (1 - sizes["minimal"] / sizes["traditional"])
        rows.append([f"{pair}: parameters", theirs, f"{fewer:.0f}% fewer at expansion 4", by])
    return rows


def _flash_rnn(load: Load) -> list[list[str]]:
    results = _results(load, "recurrent")
    if results is None:
        return []
    rows = []
    for what, theirs in (
        ("forward", "Triton 1.99 ms, fused CUDA 3.1, alternating 8.19, PyTorch 152"),
        ("forward + backward", "Triton 18.94 ms, fused CUDA 8.64, alternating 20.5, PyTorch 500"),
    ):
        found = results[f"lstm {what}, 12 heads x 64, batch 16, 1024 tokens"]
        ours, loop = found["hf_rnn"]["ms"], found["loop over Wx.unbind(0)"]["ratio"]
        text = f"{ours:.0f} ms in float32 on 2 cores, a loop in PyTorch {loop:.1f} times as long; {NO_GPU}"
        rows.append([f"LSTM, 12 heads of 64, batch 16, 1,024 tokens: {what}", theirs, text, "recurrent.py"])
    return rows


def _gpu_only(load: Load) -> list[list[str]]:
    shape, record = "mLSTM, 65,536 tokens as 8 x 8,192, 16 heads of 128/256", load("kernels", "gpu")
    rows = []
    for what, theirs in (
        ("forward", "TFLA 6.37 ms, Mamba-2 3.63, FlashAttention-3 7.48 (H100)"),
        ("forward + backward", "TFLA 15.23 ms, Mamba-2 27.0, FlashAttention-3 32.3 (H100)"),
    ):
        ours = NO_GPU
        if record is not None:
            ms = record["results"][f"mlstm_scan {what}, 8 x 8192"]["hf_rnn"]["ms"]
            ours = f"{ms:.2f} ms ({record['device']})"
        rows.append([f"{shape}: {what}", theirs, ours, "kernels.py"])
    return rows


def _xlstm_7b(load: Load) -> list[list[str]]:
    results, large = _results(load, "decoding"), load("decoding_7b", "gpu")
    if results is None:
        return []
    short, long = (results[f"xLSTM, a token after {n}, batch 1"]["hf_rnn"]["ms"] for n in (128, 8192))
    theirs = "157.4 tokens a second after 128 to 16,384 tokens (a Transformer of Llama's: 147.6 to 37.2)"
    seven = NO_GPU
    if large is not None:
        rates = [large["results"][f"a token after {n}, batch 1"]["hf_rnn"]["tokens_per_second"] for n in (128, 16384)]
        seven = f"{rates[0]:.1f} after 128, {rates[1]:.1f} after 16,384 ({large['device']}, decoding_7b.py)"
    ours = f"at a million parameters {short:.2f} ms a token after 128, {long:.2f} after 8,192 (2 cores); 7B: {seven}"
    return [["xLSTM-7B: decoding at batch 1", theirs, ours, "decoding.py"]]


def _zero_order(load: Load) -> list[list[str]]:
    results, large = _results(load, "zero_order"), load("zero_order_billion", "gpu")
    if results is None:
        return []
    found = results["LSTM, batch 1, 16 tokens"]
    name = next(iter(found))
    ours = (
        f"64 directions, two blocks of width 256, 16 tokens: {found[name]['ms'] / 1e3:.3f} s, one after another "
        f"{found['one after another']['ratio']:.0f} times as long (2 cores)"
    )
    if large is not None:
        seconds = statistics.median(large["results"]["seconds"])
        ours += f"; 1.1B: {seconds:.1f} s ({large['device']}, zero_order_billion.py)"
    theirs = "96 directions, 10 tokens, one GPU: 5.7 s a step at 100k parameters, 6.0 at 1M, 7.8 at 10M, 145 at 1.1B"
    return [["CD-RGE: seconds a step", theirs, ours, "zero_order.py"]]


def _memories(load: Load) -> list[list[str]]:
    results = _results(load, "memory_scaling")
    if results is None:
        return []
    norms = results["gradient_norms"]
    ratio = max(norms["BPTT"]) / min(norms["BPTT"])
    return [
        [
            "SMT: path of credit over T tokens",
            "O(1), of backpropagation through time O(T)",
            f"gradient by each of 128 states: of SMT within {100 * (max(norms['SMT']) / min(norms['SMT']) - 1):.0f}%, "
            f"of backpropagation through time {ratio:,.0f} times apart",
            "memory_scaling.py",
        ]
    ]


def _rate(load: Load) -> list[list[str]]:
    results = _results(load, "rate_constrained")
    if results is None:
        return []
    saved = []
    for what, runs in (("1,500 steps", results["text"]), ("3,000", results["longer text"])):
        found = [run["equal_loss"]["ans at +0.5%"]["saved"] for run in runs]
        saved.append(f"{what}: " + ", ".join("none" if x is None else f"{100 * x:.0f}%" for x in found))
    theirs = "74 to 90% fewer bits than fixed-length codes, without loss of accuracy, of large pretrained models"
    ours = "bits fewer than normal training, same quantiser and coder, at 0.5% more loss, 3 seeds: " + "; ".join(saved)
    return [["BackSlash: compression", theirs, ours, "rate_constrained.py"]]
