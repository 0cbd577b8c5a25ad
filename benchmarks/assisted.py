"""When do candidates pay: tokens by decoding with them beside plain decoding, over how many of them are right?

    python benchmarks/assisted.py

`generate()`, greedy, one sequence on one thread of a CPU: 48 tokens after 16, of random weights, so that which
candidates are right can be chosen: 8 at a time, each right with a probability, for nothing or after a draft of 1
million parameters has read and said them. All give the tokens of plain decoding; whoever does not is not timed. And
what a pass costs in which candidates are read, over their number: as one compiled call, and as prompts are read.
"""

from collections.abc import Callable
from functools import partial

import torch
from driver import Rows, compare, save, sized, table
from models import make
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from hf_rnn import RecurrentCache

LARGE = [("minGRU", 1_000_000), ("minGRU", 20_000_000), ("LSTM", 20_000_000), ("xLSTM", 20_000_000)]
MODELS = sized(LARGE, LARGE, [("minGRU", 40_000)])
NEW, CANDIDATES, DRAFT = sized(48, 48, 4), 8, sized(1_000_000, 1_000_000, 20_000)
RIGHT = (0.0, 0.5, 0.8, 1.0)
LENGTHS = sized([1, 2, 5, 9, 17, 32], [1, 2, 5, 9, 17, 32], [1, 2])


class Known(CandidateGenerator):
    """Candidates from the text that will come, each but with probability `right` another token."""

    requires_model_outputs = False

    def __init__(self, text: Tensor, right: float, draft: Callable[[Tensor, int], None] | None):
        self.text, self.right, self.draft = text, right, draft
        self.generator = torch.Generator().manual_seed(0)

    def get_candidates(self, input_ids: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        candidates = self.text[:, input_ids.shape[1] : self.text.shape[1] - 1][:, :CANDIDATES]
        wrong = torch.rand(candidates.shape, generator=self.generator) >= self.right
        if self.draft is not None:
            self.draft(input_ids, candidates.shape[1])
        return torch.cat([input_ids, (candidates + wrong) % 256], 1), None

    def update_candidate_strategy(self, *args, **kwargs) -> None:
        pass


def draft_of(parameters: int) -> Callable[[Tensor, int], None]:
    """What a draft does for so many candidates: reads what is new, and as many tokens of its own less one."""
    model = make("minGRU", parameters, 256).eval()

    @torch.no_grad()
    def run(input_ids: Tensor, count: int) -> None:
        state = model(input_ids[:, -4:]).cache if not seen else seen[0]
        seen[:] = [state]
        for _ in range(count + 1):
            model(input_ids=input_ids[:, -1:], cache=state)

    seen: list[RecurrentCache] = []
    return run


def tokens(model, ids: Tensor, right: float | None = None, text: Tensor | None = None, draft=None) -> list[Tensor]:
    """Greedy decoding's, by candidates where `right` says how many of them are."""
    options = dict(max_new_tokens=NEW, do_sample=False)
    if right is None:
        return [model.generate(ids, **options)]
    known = Known(text, right, draft)
    model._get_candidate_generator = lambda **kwargs: known
    return [model.generate(ids, prompt_lookup_num_tokens=CANDIDATES, **options)]


def decoding(name: str, parameters: int) -> Rows:
    torch.manual_seed(0)
    model, ids = make(name, parameters, 256).eval(), torch.randint(0, 256, (1, 16))
    (text,) = tokens(model, ids)
    contestants = {"hf_rnn": partial(tokens, model, ids)}
    for right in RIGHT:
        contestants[f"hf_rnn, candidates, {right:.0%} right"] = partial(tokens, model, ids, right, text)
    if parameters > DRAFT:
        for right in (0.8, 1.0):
            by_draft = partial(tokens, model, ids, right, text, draft_of(DRAFT))
            contestants[f"hf_rnn, a draft's candidates, {right:.0%} right"] = by_draft
    rows = compare(contestants, [text.double()], tolerance=0.0, repeats=7, seconds=4)
    for row in rows.values():
        if "ms" in row:
            row["tokens_per_second"] = 1e3 * NEW / row["ms"]
    table(f"{name}, {parameters:,} parameters, {NEW} tokens", rows)
    return rows


@torch.no_grad()
def passes(name: str, parameters: int) -> Rows:
    torch.manual_seed(0)
    model = make(name, parameters, 256).eval()

    def read(ids: Tensor, state: RecurrentCache) -> None:
        model(input_ids=ids, cache=state)
        state.crop(0)

    contestants = {}
    for length in LENGTHS:
        ids = torch.randint(0, 256, (1, length))
        state = model(torch.randint(0, 256, (1, 16))).cache
        recording = state.clone()
        recording.activate_past_recording()
        contestants[f"hf_rnn, {length} tokens as one call"] = partial(read, ids, recording)
        if length > 1:
            contestants[f"hf_rnn, {length} tokens as prompts are read"] = partial(read, ids, state)
    rows = compare(contestants, repeats=15, seconds=2)
    table(f"{name}, {parameters:,} parameters, one pass", rows)
    return rows


def main() -> None:
    torch.set_num_threads(1)  # threads that wait for one another are slow where others use the machine
    results: dict[str, Rows] = {}
    for name, parameters in MODELS:
        results[f"{name}, {parameters:,} parameters, {NEW} tokens"] = decoding(name, parameters)
        results[f"{name}, {parameters:,} parameters, one pass"] = passes(name, parameters)
    save("assisted", results)


if __name__ == "__main__":
    main()
