"""How far is what `hf-rnn plan` counts from the memory that a step really takes?

    python benchmarks/planning.py

Bytes for each token at the peak of a step of backpropagation beyond weights and gradients: counted on the meta device,
and what the allocator of a CPU reports, with torch's own elementwise operations ("plain") and with the package's
compiled ones, which keep less. Float32, and bfloat16 (counted) beside autocast (real), as GPUs compute.
"""

import itertools
from typing import Any
from unittest.mock import patch

import torch
from driver import save
from transformers import AutoModelForCausalLM

import hf_rnn
from hf_rnn.planning.counting import backpropagation, count, drop_gradients, on_meta

TOKENS = dict(vocab_size=300, pad_token_id=None, bos_token_id=None, eos_token_id=None)
SIZES = dict(hidden_size=64, num_hidden_layers=3, **TOKENS)
CONFIGS: dict[str, Any] = {
    "LSTM": hf_rnn.LSTMConfig(num_heads=2, block_layout="paper", **SIZES),
    "GRU": hf_rnn.GRUConfig(block_layout="paper", **SIZES),
    "minGRU": hf_rnn.MinGRUConfig(block_layout="paper", **SIZES),
    "minLSTM": hf_rnn.MinLSTMConfig(block_layout="paper", **SIZES),
    "minGRU, gated": hf_rnn.MinGRUConfig(**SIZES),
    "xLSTM": hf_rnn.XLSTMConfig(num_heads=2, **SIZES),
    "xLSTM, neurips": hf_rnn.XLSTMConfig(num_heads=2, block_layout="neurips", slstm_at=[1], **SIZES),
    "memory RNN": hf_rnn.MemoryRNNConfig(hidden_size=64, **TOKENS),
}


def peak(run) -> int:
    """Bytes of tensors, at most, by what the allocator reports."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def measured(config: Any, autocast: bool = False, plain: bool = True) -> float:
    """Bytes for each token, real ones."""
    model = drop_gradients(AutoModelForCausalLM.from_config(config).train())
    sizes, peaks = (16, 32) if config.model_type == "hf_rnn_memory" else (256, 512), []
    for size in sizes:
        ids = torch.zeros(2, size, dtype=torch.long)

        def step(ids=ids) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()

        if plain:
            with patch("hf_rnn_kernels.threads.worthwhile", lambda x: False):
                step()  # what is allocated once
                peaks.append(peak(step))
        else:
            step()
            peaks.append(peak(step))
    return (peaks[1] - peaks[0]) / (2 * (sizes[1] - sizes[0]))


def counted(config: Any, dtype: torch.dtype = torch.float32) -> float:
    """Bytes for each token, on paper."""
    model = on_meta(lambda: AutoModelForCausalLM.from_config(config), dtype).train()
    time = 8 if config.model_type == "hf_rnn_memory" else 128
    wide = (backpropagation(model, rows) for rows in (64, 128))
    return count(lambda n: next(wide)(time), (64 * time, 128 * time)).bytes


def main() -> None:
    results = {}
    print(f"{'bytes for each token':16} {'counted':>10} {'plain':>10} {'compiled':>10} {'bf16':>10} {'autocast':>10}")
    for name, config in CONFIGS.items():
        row = [counted(config), measured(config), measured(config, plain=False)]
        row += [counted(config, torch.bfloat16), measured(config, autocast=True)]
        results[name] = dict(zip(("counted", "plain", "compiled", "bfloat16", "autocast"), row, strict=True))
        print(f"{name:20} " + " ".join(f"{x:10,.0f}" for x in row), flush=True)
    save("planning", results)


if __name__ == "__main__":
    main()
