"""A whole model as one program, for torch.export and ONNX: any batch, any length, the state handed on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_rnn.exchange.onnx_operators import TABLE
from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.versions import STATE


class StatefulModel(nn.Module):
    """A model with tensors alone in and out.

    Args:
        model: any model of this package; put in eval mode.
        padding: whether `forward` is told of padding. Not by default: where there is none, half of what ONNX does for a
            token would be for it.

    Attributes:
        input_names, output_names: of what `forward` takes and returns: the model's, such as "input_ids" and "logits",
            then "state_0", "state_1", ... and "new_state_0", ... where it keeps a state (`config.use_cache`).
    """

    def __init__(self, model: PreTrainedModel, padding: bool = False):
        super().__init__()
        self.model, self.padding = model.eval(), padding
        self.layers: Any = model.base_model.layers
        with torch.no_grad():
            outputs = model(**self._given(self.example()))
        self.state_count = sum(len(layer.state_shapes) for layer in self.layers) if outputs.get(STATE) else 0
        self.outputs = [name for name, x in outputs.items() if isinstance(x, Tensor)]

    @property
    def input_names(self) -> list[str]:
        masks = ["attention_mask"] * self.padding
        return [self.model.main_input_name, *masks, *(f"state_{i}" for i in range(self.state_count))]

    @property
    def output_names(self) -> list[str]:
        return [*self.outputs, *(f"new_state_{i}" for i in range(self.state_count))]

    def example(self, batch: int = 2, time: int = 3) -> list[Tensor]:
        """Tokens (B, T), and with `padding` a mask of ones."""
        ids = torch.zeros(batch, time, dtype=torch.long)
        return [ids, torch.ones_like(ids)] if self.padding else [ids]

    def initial_states(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        """The state before the first token: float32 tensors (B, ...), layer by layer; none where the model has none."""
        if not self.state_count:
            return ()
        states = [state for layer in self.layers for state in layer.initial_states(batch_size)]
        return tuple(x.detach().contiguous() for x in states)

    def _given(self, tensors) -> dict[str, Tensor]:
        return dict(zip([self.model.main_input_name, "attention_mask"], tensors, strict=False))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tokens (B, T), with `padding` their mask (B, T), zeros at padding, and the states before them to the model's
        outputs and the states after them."""
        given: dict[str, Any] = self._given(tensors[: 1 + self.padding])
        cache = RecurrentCache(len(self.layers))
        if self.state_count:
            left = iter(tensors[1 + self.padding :])
            cache.states = [tuple(next(left).clone() for _ in layer.state_shapes) for layer in self.layers]
            given[STATE] = cache
        outputs = self.model(**given)
        states = (x for state in cache.states if state is not None for x in state)
        return *(outputs[name] for name in self.outputs), *states


def export_model(model: PreTrainedModel, padding: bool = False) -> torch.export.ExportedProgram:
    """`StatefulModel` as a program for any batch size and length."""
    whole = StatefulModel(model, padding)
    inputs = whole.example()
    states = whole.initial_states(len(inputs[0]))
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    dynamic = *({0: batch, 1: time} for _ in inputs), *({0: batch} for _ in states)
    with torch.no_grad():
        return torch.export.export(whole, (*inputs, *states), dynamic_shapes=(dynamic,))


@torch.no_grad()  # or a loop's gradients would be part of the program
def to_onnx(model: PreTrainedModel, path: str | Path, padding: bool = False) -> None:
    """Write `StatefulModel` as an ONNX file.

    Raises:
        ImportError: onnx or onnxscript is missing: `pip install 'hf-rnn[onnx]'`.
    """
    whole = StatefulModel(model, padding)
    program = export_model(model, padding).run_decompositions(TABLE)
    names = dict(input_names=whole.input_names, output_names=whole.output_names)
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    assert onnx is not None
    onnx.save(str(path))
