"""What does a state cost: its bytes, a file, the fingerprint of its model, a prompt that was read before?

    python benchmarks/states.py

Models of 1 million parameters on a CPU. A prompt of 4,096 tokens is read at once, in the pieces that the prompt cache
reads, and from it.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from driver import compare, save, sized, table
from models import LAYOUTS, make
from torch import Tensor

from hf_rnn import PromptCache, RecurrentCache
from hf_rnn.skeleton import state_file

PARAMETERS, PROMPT, EVERY = *sized((1_000_000, 4096), (1_000_000, 4096), (40_000, 24)), sized(512, 512, 8)
NAMES = [name for name in LAYOUTS if "transformers" not in name and "paper" not in name]


@torch.no_grad()
def of_model(name: str, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, ids = make(name, PARAMETERS, 256).eval(), torch.randint(0, 256, (1, PROMPT))
    file, known = Path(folder) / "a.state", PromptCache(model, every=EVERY)
    state = known.read(ids)
    state.save(file)

    def fingerprint() -> None:
        state_file._FINGERPRINTS.clear()
        state_file.fingerprint(model)

    def whole() -> list[Tensor]:
        return [x for layer in model.model(ids[:, :-1], use_cache=True).cache.states for x in layer]

    def by_cache(prompts: PromptCache | None) -> list[Tensor]:
        prompts = PromptCache(model, every=EVERY) if prompts is None else prompts
        return [x for layer in prompts.read(ids).states for x in layer]

    prompt = {
        "hf_rnn": whole,
        f"hf_rnn, by the prompt cache, in pieces of {EVERY}": partial(by_cache, None),
        "hf_rnn, by the prompt cache, again": partial(by_cache, known),
    }
    reference = [x.double() for x in whole()]
    files = {
        "hf_rnn, state.save": partial(state.save, file),
        "hf_rnn, RecurrentCache.load": lambda: RecurrentCache.load(file, model) and None,
        "hf_rnn, fingerprint": fingerprint,
        "hf_rnn, state.clone": lambda: state.clone() and None,
    }
    rows = compare(prompt, reference, tolerance=1e-3, repeats=7, seconds=4)
    file_rows = compare(files, repeats=15, seconds=2)
    table(f"{name}, a prompt of {PROMPT} tokens", rows)
    table(f"{name}, a state of {state.nbytes:,} bytes, {file.stat().st_size:,} in a file", file_rows)
    bytes_ = {"state_bytes": state.nbytes, "file_bytes": file.stat().st_size}
    return {f"{name}, a prompt of {PROMPT} tokens": rows, f"{name}, its state": file_rows, f"{name}, bytes": bytes_}


def main() -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            results |= of_model(name, folder)
    save("states", results)


if __name__ == "__main__":
    main()
