"""Seconds for a step of CD-RGE with a billion parameters, in the published setting.

    python benchmarks/zero_order_billion.py              # 350 heads of 850 units, on a GPU with 40 GiB and more
    python benchmarks/zero_order_billion.py --heads 2 --size 64 --batch 64    # the same on any machine, small

An LSTM of one layer, 100 wide embeddings, 96 directions, batch 1,024, 10 tokens, 20 steps on the same batch, whose loss
has to fall (arXiv 2505.17852: 145 s a step on one A40, 4.4 on eight). The results are saved after each step; with
--minutes no step begins after so many.
"""

import argparse
import tempfile
import time

import torch
from driver import DEVICE, DRY, GPU, save, sized

from hf_rnn import LSTMConfig, LSTMForCausalLM, ZOConfig, ZOTrainer

PUBLISHED = {"heads": 350, "size": 850, "batch": 1024, "directions": 96, "tokens": 10, "steps": 20}
DEFAULTS = sized(*2 * [PUBLISHED], dry={"heads": 2, "size": 8, "batch": 2, "directions": 2, "tokens": 3, "steps": 2})


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    settings = dict(hidden_size=100, expansion_factor=options.heads * options.size / 100, num_heads=options.heads)
    tokens = dict(vocab_size=32, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LSTMForCausalLM(
            LSTMConfig(**settings, **tokens, num_hidden_layers=1, block_layout="paper", feed_forward_factor=0)
        )
        ids = torch.randint(0, 32, (options.batch, options.tokens + 1))
    inputs = {"input_ids": ids, "labels": ids}
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            folder, report_to="none", use_cpu=not GPU, bf16=GPU, num_directions=options.directions, epsilon=5e-3,
            learning_rate=5e-3, directions_per_forward=1, chunk_size=2, replay_log=False,
        )  # fmt: skip
        trainer = ZOTrainer(model, args)
    optimizer, losses, seconds, begun = trainer.create_optimizer(), [], [], time.perf_counter()
    sizes = {name: getattr(options, name) for name in PUBLISHED}
    for step in range(options.steps):
        if time.perf_counter() - begun > 60 * options.minutes:
            break
        trainer.state.global_step = step
        start = time.perf_counter()
        losses.append(float(trainer.training_step(model, dict(inputs))))
        optimizer.step()
        if GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        print(f"step {step}: loss {losses[-1]:.4f}, {seconds[-1]:.2f} s", flush=True)
        memory = torch.cuda.max_memory_allocated() / 2**30 if GPU else None
        result = {"parameters": model.num_parameters(), "losses": losses, "seconds": seconds, "gib": memory}
        if sizes == PUBLISHED or DRY:
            save("zero_order_billion", result | sizes)


if __name__ == "__main__":
    main()
