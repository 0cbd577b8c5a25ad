"""What does a token cost after a prefix of 128 to 65,536 tokens, in time and in memory?

    python benchmarks/decoding.py

A step of the model from a returned state, and generate() beside it, which also carries the growing list of tokens.
"""

import statistics
import time

import psutil
import torch
from driver import save

from hf_rnn import MinGRUConfig, MinGRUForCausalLM

PREFIXES = [128, 1024, 8192, 65536]
STEPS, NEW_TOKENS = 300, 64


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = MinGRUForCausalLM(MinGRUConfig()).to(device).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    prompts = {n: torch.randint(0, 256, (1, n), device=device) for n in PREFIXES}
    with torch.no_grad():
        states = {n: model(ids, logits_to_keep=1).past_key_values for n, ids in prompts.items()}
        state_bytes = {
            n: sum(x.untyped_storage().nbytes() for layer in s.states for x in layer) for n, s in states.items()
        }
        times: dict[int, list[float]] = {n: [] for n in PREFIXES}
        rss = {}
        for round_ in range(STEPS + 20):
            for n in PREFIXES:  # in turn, so that a drifting machine is unfair to none
                start = time.perf_counter()
                model(token, past_key_values=states[n])
                if device == "cuda":
                    torch.cuda.synchronize()
                if round_ >= 20:
                    times[n].append(1e3 * (time.perf_counter() - start))
        for n in PREFIXES:
            before = psutil.Process().memory_info().rss
            for _ in range(STEPS):
                model(token, past_key_values=states[n])
            rss[n] = (psutil.Process().memory_info().rss - before) / 2**20
        generated = {}
        for n, ids in prompts.items():
            state = model(ids, logits_to_keep=1).past_key_values
            state.seen_tokens -= 1  # generate() reads the last token itself
            start = time.perf_counter()
            model.generate(ids, past_key_values=state, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
            generated[n] = 1e3 * (time.perf_counter() - start) / NEW_TOKENS
    rows = {
        n: {
            "step_ms": statistics.median(times[n]),
            "ratio_to_shortest": statistics.median(times[n]) / statistics.median(times[PREFIXES[0]]),
            "state_bytes": state_bytes[n],
            "memory_growth_mib": rss[n],
            "generate_ms_per_token": generated[n],
        }
        for n in PREFIXES
    }
    print(f"{'prefix':>8} {'ms a step':>10} {'ratio':>7} {'state bytes':>12} {'growth MiB':>11} {'generate() ms':>14}")
    for n, row in rows.items():
        print(
            f"{n:8} {row['step_ms']:10.3f} {row['ratio_to_shortest']:7.3f} {row['state_bytes']:12}"
            f" {row['memory_growth_mib']:11.2f} {row['generate_ms_per_token']:14.3f}"
        )
    save("decoding", {str(n): row for n, row in rows.items()})


if __name__ == "__main__":
    main()
