"""How fast is a model in onnxruntime, beside here?

    python benchmarks/exported.py

Models of a million parameters, as `hf_rnn.to_onnx` writes them: prompts of 512 tokens, one and eight at once, and one
token after another with the state handed on, for one and for eight sequences. Logits of the first call are checked
against each model's own in float64. onnxruntime runs on the CPU, with as many threads as torch.
"""

import copy
import tempfile
from pathlib import Path

import torch
from driver import compare, table
from models import make
from resumable import Parts
from torch import Tensor, nn

import hf_rnn
from hf_rnn import StatefulModel, to_onnx
from hf_rnn.cli.export import Session

PARAMETERS, VOCABULARY = 1_000_000, 256
TIME, BATCHES = 512, (1, 8)
NAMES = ("LSTM", "GRU", "minGRU", "minLSTM", "xLSTM", "sLSTM", "memory RNN")
ACCEPTED = {"onnxruntime": "a graph without Python around it"}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name != "memory RNN":
        return make(name, PARAMETERS, VOCABULARY).eval()
    config = hf_rnn.MemoryRNNConfig(vocab_size=VOCABULARY, hidden_size=144)  # 0.9 million
    return hf_rnn.MemoryRNNForCausalLM(config).eval()


class Ours:
    """Tokens (B, T) again and again, from the state behind them where `hands_on`."""

    def __init__(self, model: nn.Module, ids: Tensor, hands_on: bool):
        self.model, self.ids, self.hands_on = model, ids, hands_on
        self.states = StatefulModel(model).initial_states(len(ids))
        self.cache = self._new()

    def _new(self) -> hf_rnn.RecurrentCache:
        cache, left = self.model.new_cache(), iter(self.states)
        cache.states = [tuple(next(left).clone() for _ in layer.state_shapes) for layer in self.model.model.layers]
        return cache

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        return [self.model(self.ids, cache=self.cache if self.hands_on else self._new()).logits]


class Onnxruntime(Ours):
    """The same in onnxruntime."""

    def __init__(self, session: Session, model: nn.Module, ids: Tensor, hands_on: bool):
        super().__init__(model, ids, hands_on)
        self.session = session

    def __call__(self) -> list[Tensor]:
        logits, *states = self.session(self.ids, *self.states)
        self.states = states if self.hands_on else self.states
        return [logits]


def measured(name: str) -> dict[str, dict]:
    """One architecture: prompts and tokens."""
    model, results = build(name), {}
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(model, path := Path(folder) / "model.onnx")
        session = Session(path)
    exact = copy.deepcopy(model).double()
    for batch in BATCHES:
        for time in (TIME, 1):
            ids = torch.randint(0, VOCABULARY, (batch, time))
            contestants = {
                "hf_rnn": Ours(model, ids, time == 1),
                "onnxruntime": Onnxruntime(session, model, ids, time == 1),
            }
            with torch.no_grad():
                reference = [exact(ids, use_cache=False).logits]
            title = f"{name}, {'a token' if time == 1 else f'{time} tokens'}, batch {batch}"
            repeats, seconds = (300, 5) if time == 1 else (20, 15)
            rows = compare(contestants, reference, accepted=ACCEPTED, repeats=repeats, seconds=seconds)
            rows["hf_rnn"]["parameters"] = model.num_parameters()
            table(title, rows)
            results[title] = rows
    return results


def main() -> None:
    parts, results = Parts("exported"), {}
    for name in NAMES:
        results |= parts.run(name, measured, name) or {}
    parts.finish(results)


if __name__ == "__main__":
    main()
