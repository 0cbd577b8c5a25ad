"""How much memory does a training step take beyond the weights, over the length of sequences?

    python benchmarks/zero_order_memory.py

An LSTM of two blocks of width 256 with 1,000 tokens, batch 4, each case in a process of its own, in chunks of 128: the
loss alone, without gradients ("inference"); a step of ZOTrainer with SGD, 8 directions one after another, and with
as many at once as it chooses; the same with AdamW, which needs gradients and two more copies of the weights; a step of
backpropagation through time with SGD.
"""

import itertools
import json
import subprocess
import sys
import tempfile

import torch
from driver import save
from torch import Tensor

from hf_rnn import LSTMConfig, LSTMForCausalLM, ZOConfig, ZOTrainer
from hf_rnn_trainers.zo.evaluation import stream_losses

LENGTHS, CHUNK, BATCH, VOCABULARY = (512, 2048, 8192), 128, 4, 1000
GPU = torch.cuda.is_available()
CASES = ["inference", "ZO, one after another", "ZO, many at once", "ZO with AdamW", "backpropagation"]


def case(name: str, time: int):
    """A function that does the work once, and the model."""
    torch.manual_seed(0)
    model = LSTMForCausalLM(
        LSTMConfig(vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=2, block_layout="paper")
    )
    model = model.to("cuda" if GPU else "cpu")
    ids = torch.randint(0, VOCABULARY, (BATCH, time), device=model.device)
    inputs: dict[str, Tensor] = {"input_ids": ids, "labels": ids}
    if name == "inference":
        return torch.no_grad()(lambda: stream_losses(model.eval(), {k: x[None] for k, x in inputs.items()}, CHUNK))
    if name == "backpropagation":

        def step():
            model(**inputs, use_cache=False).loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=1e-3)
                    p.grad = None

        return step
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            folder, report_to="none", use_cpu=not GPU, num_directions=8, chunk_size=CHUNK, replay_log=False,
            optim="adamw_torch" if name == "ZO with AdamW" else "sgd",
        )  # fmt: skip
        trainer = ZOTrainer(model, args)
    optimizer = trainer.create_optimizer()
    if name == "ZO, one after another":
        members = [(j, sign) for j in range(8) for sign in (1, -1)]
        trainer._losses = lambda inputs, step: torch.cat(
            [trainer._losses_of(inputs, step, [member]) for member in members], 1
        ).view(2, 8, 2)

    def step():
        trainer.training_step(model, dict(inputs))
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(name: str, time: int) -> float:
    """MiB of tensors, at most, beyond those that were there before, that is, the weights: by what the allocator
    reports, which no heap's habits can blur."""
    run = case(name, time)
    run()  # what is allocated once, an optimizer's state for one, counts as there
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**20


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
        return
    results: dict[str, dict] = {}
    for name in CASES:
        results[name] = {}
        for time in LENGTHS:
            command = [sys.executable, __file__, name, str(time)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[name][str(time)] = json.loads(output.splitlines()[-1])
        row = results[name]
        row["growth"] = row[str(LENGTHS[-1])] / row[str(LENGTHS[0])]
        print(f"{name:24}" + "".join(f"{row[str(t)]:10.1f}" for t in LENGTHS) + f"   x{row['growth']:.2f}", flush=True)
    save("zero_order_memory", results)


if __name__ == "__main__":
    main()
