"""What the rate step costs beside a training step: CPU time of one thread, a minGRU of about 5M parameters.

python benchmarks/rate_overhead.py [--steps 20]

Steps of 2,048 tokens in float32 with AdamW. The rate's parts are timed by themselves between the steps, so that what
runs beside takes from both alike: the estimate of shapes and, for a target, the entropy of the quantised weights once
in `rate_every` steps, the shrinking at each.
"""

import argparse
import os
import statistics
import time
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"

import torch
from driver import save
from transformers import TrainerControl, TrainerState, TrainingArguments

import hf_rnn


def measure(steps: int, tokens: tuple[int, int], **settings: Any) -> dict:
    torch.manual_seed(0)
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    model = hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(vocab_size=256, hidden_size=384, num_hidden_layers=4, **ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callback = hf_rnn.RateCallback(**settings)
    args: Any = TrainingArguments("unused", report_to="none", use_cpu=True)
    state, control = TrainerState(global_step=0, max_steps=10 * steps), TrainerControl()
    callback.on_train_begin(args, state, control, model=model)
    training, rate = [], []
    for step in range(steps + 2):
        x = torch.randint(256, tokens)
        start = time.process_time()
        model(x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        middle = time.process_time()
        state.global_step = step
        callback.on_optimizer_step(args, state, control, optimizer=SimpleNamespace(param_groups=optimizer.param_groups))
        end = time.process_time()
        if step >= 2:
            training.append(middle - start)
            rate.append(end - middle)
    every = callback.settings.rate_every
    estimates = [r for step, r in enumerate(rate, 2) if step % every == 0]
    plain = statistics.median(r for step, r in enumerate(rate, 2) if step % every)
    mean = plain + (statistics.median(estimates) - plain) / every
    found = dict(parameters=model.num_parameters(), tokens=tokens[0] * tokens[1], settings=settings)
    found |= dict(step_ms=1e3 * statistics.median(training), rate_ms=1e3 * mean, shrink_ms=1e3 * plain)
    return found | dict(estimate_ms=1e3 * statistics.median(estimates), share=mean / statistics.median(training))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    options, rows = parser.parse_args(), {}
    for name, settings in {"shapes": {}, "shapes and target_bits": {"target_bits": 3.0}}.items():
        rows[name] = row = measure(options.steps, (8, 256), **settings)
        shown = {key: round(v, 4) for key, v in row.items() if isinstance(v, float)}
        print(name, row["parameters"], row["tokens"], shown, flush=True)
        save("rate_overhead", rows)


if __name__ == "__main__":
    main()
