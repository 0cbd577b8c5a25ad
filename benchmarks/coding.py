"""Compressed checkpoints beside what others make of the same weights: bits, errors, and speeds on one core; and loading
a model of 100M parameters, its seconds and its memory, against a plain checkpoint.

python benchmarks/coding.py [--checkpoint FOLDER]

Peers: pip install 'hf-rnn[coding-peers]', and with --no-deps nncodec, which asks for an older numpy than it needs.

nncodec has its own quantiser; its rows are compared at equal error. Without a checkpoint the weights are those of a GRU
that this script trains on text for a minute.
"""

import argparse
import importlib
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any
from unittest.mock import MagicMock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import torch
from driver import RESULTS, save
from transformers import AutoModelForCausalLM

from hf_rnn import save_compressed
from hf_rnn.compression import curvature as steps
from hf_rnn_kernels.coding import (
    decode_tensor,
    dequantize,
    encode_rows,
    encode_tensor,
    entropy,
    quantize,
    suited,
    symbols,
)

LOAD = """
import json, re, sys, time
import torch, hf_rnn
from transformers import AutoModelForCausalLM

def mib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

AutoModelForCausalLM.from_pretrained(sys.argv[2])  # what is imported and compiled once
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, start = mib("VmRSS"), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
total = float(sum(p.sum() for p in model.parameters()))  # plain weights are read when touched
print(json.dumps(dict(seconds=time.perf_counter() - start, mib=mib("VmHWM") - before)))
"""


def speeds(millions: int = 16) -> dict:
    """MB of float32 weights a second, best of three; Laplacian weights at about four bits."""
    x = torch.distributions.Laplace(0.0, 0.1).sample((millions * 10**6,))
    found: dict[str, Any] = {}
    for coder in ("ans", "exp_golomb", "trellis"):
        rates: dict[str, list[float]] = {"encode": [], "decode": []}
        for _ in range(4):
            start = time.process_time()  # one thread
            payload = encode_tensor(symbols(x, -5, 0.0, coder), -5, coder=coder)
            middle = time.process_time()
            decode_tensor(payload)
            end = time.process_time()
            rates["encode"].append(4 * millions / (middle - start))
            rates["decode"].append(4 * millions / (end - middle))
        found[coder] = {name: max(values[1:]) for name, values in rates.items()}
        found[coder]["bits"] = 8 * payload.numel() / x.numel()
        print(f"{coder:12} {found[coder]}", flush=True)
    return found


def relative_error(decoded: list[torch.Tensor], weights: list[torch.Tensor]) -> float:
    wrong = sum(float((a - b).double().square().sum()) for a, b in zip(decoded, weights, strict=True))
    return (wrong / sum(float(b.double().square().sum()) for b in weights)) ** 0.5


def sizes(weights: dict[str, torch.Tensor], exponent: int) -> list[dict]:
    """Bits a weight of every way to store matrices quantised with one step; and of lossless peers on float32."""
    values, total = list(weights.values()), sum(w.numel() for w in weights.values())
    rows = []

    def row(name: str, bits: float, error: float) -> None:
        rows.append(dict(name=name, step=f"2^{exponent}", bits=bits, error=error))
        print(f"  {name:34} {bits:6.3f} bits, error {error:.4f}", flush=True)

    coders = [suited("trellis", w) for w in values]
    paths = [symbols(w, exponent, 0.1, coder) for w, coder in zip(values, coders, strict=True)]
    size = sum(encode_tensor(q, exponent, coder=coder).numel() for q, coder in zip(paths, coders, strict=True))
    error = relative_error([dequantize(q, exponent) for q in paths], values)
    row("trellis, rate 0.1", 8 * size / total, error)
    for rate in (0.0, 0.1, 0.3):
        found = [quantize(w, exponent, rate) for w in values]
        error = relative_error([dequantize(q, exponent) for q in found], values)
        label = "rounded" if rate == 0 else f"rate {rate}"
        row(f"order-0 entropy, {label}", sum(entropy(q) * q.numel() for q in found) / total, error)
        for coder in ("ans", "exp_golomb"):
            size = sum(encode_tensor(q, exponent, coder=coder).numel() for q in found)
            row(f"{coder}, {label}", 8 * size / total, error)
        if rate == 0:
            wide = np.int8 if max(int(q.abs().max()) for q in found) < 128 else np.int16
            raw = b"".join(q.numpy().astype(wide).tobytes() for q in found)
            row("lzma -9 of the symbols", 8 * len(lzma.compress(raw, preset=9)) / total, error)
            try:
                import zstandard

                row("zstd -19 of the symbols", 8 * len(zstandard.compress(raw, 19)) / total, error)
            except ImportError:
                print("  zstandard is not installed")
    return rows


def lossless(weights: dict[str, torch.Tensor]) -> list[dict]:
    raw, rows = b"".join(w.numpy().tobytes() for w in weights.values()), []
    count = len(raw) // 4
    rows.append(dict(name="lzma -9, float32", bits=8 * len(lzma.compress(raw, preset=9)) / count))
    try:
        import zstandard

        rows.append(dict(name="zstd -19, float32", bits=8 * len(zstandard.compress(raw, 19)) / count))
    except ImportError:
        pass
    try:
        import zipnn

        # It overwrites what it is given
        packed = zipnn.ZipNN(bytearray_dtype="float32").compress(bytearray(raw))
        rows.append(dict(name="ZipNN, float32", bits=8 * len(packed) / count))
    except ImportError:
        print("  zipnn is not installed")
    for found in rows:
        print(f"  {found['name']:34} {found['bits']:6.3f} bits, lossless", flush=True)
    return rows


def deep_cabac(
    weights: dict[str, torch.Tensor], qps: tuple[int, ...] = (-38, -32, -28, -24, -20), loss: Any = None
) -> list[dict]:
    """nncodec's bits and errors at its quantisation parameters, and losses of what it decodes to."""
    nncodec = _nncodec()
    if nncodec is None:
        print("  nncodec is not installed")
        return []
    total, rows = sum(w.numel() for w in weights.values()), []
    for qp in qps:
        with tempfile.TemporaryDirectory() as folder:
            arrays = {name: w.numpy().copy() for name, w in weights.items()}
            coded = nncodec.encode(arrays, {"qp": qp, "results": folder, "verbose": False})
            bits = 8 * len(coded) / total
            decoded = nncodec.decode(coded)
        again = {name: torch.from_numpy(np.asarray(decoded[name])) for name in weights}
        error = relative_error(list(again.values()), list(weights.values()))
        rows.append(dict(name="nncodec (DeepCABAC)", qp=qp, bits=bits, error=error))
        if loss is not None:
            rows[-1]["loss"] = loss(again)
        print(f"  nncodec, qp {qp:4} {bits:6.3f} bits, error {error:.4f}", flush=True)
    return rows


def _nncodec() -> Any:
    """nncodec.nn. Its examples, imported with it, want image libraries and more, which coding tensors does not need."""
    for _ in range(30):
        try:
            return importlib.import_module("nncodec.nn")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("nncodec"):
                return None
            sys.modules[error.name] = MagicMock()
    return None


def at_error(rows: list[dict], error: float) -> float | None:
    """Bits at an error, between the two points around it on a line of log error."""
    points = sorted((r["error"], r["bits"]) for r in rows)
    for (e1, b1), (e2, b2) in pairwise(points):
        if e1 <= error <= e2:
            return b1 + (b2 - b1) * np.log(error / e1) / np.log(e2 / e1)
    return None


def equal_loss(model: Any, ids: np.ndarray) -> dict:
    """Bits of each quantiser at shares above the held-out loss of the weights in float32; curvature is of the text that
    the model was trained on."""
    import rate_constrained

    parameters = steps.coded_parameters(model, "norm|bias")
    weights, total = (
        {name: p.detach().clone() for name, p in parameters.items()},
        sum(map(torch.numel, parameters.values())),
    )
    row, train, held_out = rate_constrained.ROW, rate_constrained.TRAIN, rate_constrained.HELD_OUT
    held = torch.from_numpy(ids[train : train + held_out // row * row].reshape(-1, row)).long()
    seen = torch.from_numpy(ids[: 256 * row].reshape(-1, row)).long()
    curvature = steps.weight_curvature(model, ({"input_ids": x[None], "labels": x[None]} for x in seen))

    @torch.no_grad()
    def loss(decoded: dict[str, torch.Tensor]) -> float:
        for name, p in parameters.items():
            p.copy_(decoded[name])
        found = rate_constrained.mean_loss(model, held, held)
        for name, p in parameters.items():
            p.copy_(weights[name])
        return found

    start, rows = loss(weights), {"nncodec": deep_cabac(weights, (-34, -32, -30, -28, -24, -20, -16), loss)}

    def point(name: str, payloads: dict[str, torch.Tensor]) -> None:
        bits = 8 * sum(p.numel() for p in payloads.values()) / total
        rows.setdefault(name, []).append(dict(bits=bits, loss=loss({n: decode_tensor(p) for n, p in payloads.items()})))
        print(f"  {name:24} {bits:6.3f} bits, {rows[name][-1]['loss'] / start - 1:+.2%}", flush=True)

    for coder in ("ans", "trellis"):
        for e in range(-8, -2):
            own = {n: suited(coder, w) for n, w in weights.items()}
            point(coder, {n: encode_tensor(symbols(w, e, 0.1, own[n]), e, coder=own[n]) for n, w in weights.items()})
        for exponent in np.arange(-26, -17):
            found = steps.quantised(weights, steps.floored(weights, curvature), 2.0**exponent, coder)
            coded = {n: encode_rows(q, e, coder=suited(coder, weights[n])) for n, (e, q) in found.items()}
            point(f"{coder}, steps of rows", coded)
    bits = {}
    for share in (0.0025, 0.005, 0.01, 0.015, 0.03):
        bits[f"+{share:.2%}"] = {
            name: at_error([r | {"error": r["loss"] / start - 1} for r in found if r["loss"] > start], share)
            for name, found in rows.items()
        }
        print(f"  at +{share:.2%}: {bits[f'+{share:.2%}']}", flush=True)
    return dict(loss=start, rows=rows, bits=bits)


def loading(millions: int = 100) -> dict:
    """Seconds and growth of memory of a plain and of a compressed load, in fresh processes, caches warm."""
    from hf_rnn import GRUConfig, GRUForCausalLM

    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    model = GRUForCausalLM(
        GRUConfig(vocab_size=32000, hidden_size=1024, num_hidden_layers=3, block_layout="paper", **tokens)
    )
    found: dict[str, Any] = {"parameters": model.num_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/plain")
        found["compression"] = str(save_compressed(model, f"{folder}/coded", step=2.0**-9))
        small = GRUForCausalLM(GRUConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, **tokens))
        save_compressed(small, f"{folder}/small")
        for name in ("plain", "coded", "plain", "coded", "plain", "coded"):
            command = [sys.executable, "-c", LOAD, f"{folder}/{name}", f"{folder}/small"]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = json.loads(result.stdout.splitlines()[-1])
            print(f"  {name:6} {measured}", flush=True)
            best = found.setdefault(name, measured)
            found[name] = {key: min(value, best[key]) for key, value in measured.items()}
    beyond = found["coded"]["seconds"] - found["plain"]["seconds"]
    found["decoding_mb_per_second"] = 4e-6 * found["parameters"] / beyond
    return found


def trained() -> tuple[Any, np.ndarray]:
    import rate_constrained

    ids = rate_constrained.read_text()
    model, _ = rate_constrained.train(0, 400, ids, rate_shrink=0.0)
    return model, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="its matrices are coded")
    parser.add_argument("--parts", nargs="*", default=["speeds", "sizes", "loading"])
    options, path = parser.parse_args(), RESULTS / "coding_cpu.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    if "speeds" in options.parts:
        results["speeds"] = speeds()
        save("coding", results)
    if "sizes" in options.parts:
        if options.checkpoint:
            model = AutoModelForCausalLM.from_pretrained(options.checkpoint)
            weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}
        else:
            model, ids = trained()
            weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}
            results["at_equal_loss"] = equal_loss(model, ids)
        results["weights"] = sum(w.numel() for w in weights.values())
        results["lossless"] = lossless(weights)
        results["sizes"] = [row for exponent in (-8, -7, -6, -5, -4) for row in sizes(weights, exponent)]
        results["deep_cabac"] = deep_cabac(weights)
        results["at_equal_error"] = []
        for row in results["deep_cabac"]:
            best = {"deep_cabac": row["bits"], "error": row["error"]}
            own = [r for r in results["sizes"] if r["name"].startswith("trellis")]
            best["trellis, rate 0.1"] = at_error(own, row["error"])
            for coder in ("ans", "exp_golomb"):
                for label in ("rounded", "rate 0.1", "rate 0.3"):
                    same = [r for r in results["sizes"] if r["name"] == f"{coder}, {label}"]
                    best[f"{coder}, {label}"] = at_error(same, row["error"])
            results["at_equal_error"].append(best)
            print(f"  at equal error: { {k: v if v is None else round(v, 3) for k, v in best.items()} }", flush=True)
        save("coding", results)
    if "loading" in options.parts:
        results["loading"] = loading()
        print(results["loading"])
        save("coding", results)


if __name__ == "__main__":
    main()
