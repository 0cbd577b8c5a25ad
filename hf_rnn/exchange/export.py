"""A whole model as one program, for torch.export and ONNX: any batch, any length, the state handed on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.versions import STATE


class StatefulModel(nn.Module):
    """A model with tensors alone in and out: (B, T) tokens, the mask of padding, and the state before them.

    Args:
        model: any model of this package; put in eval mode.

    Attributes:
        output_names: of what `forward` returns before the states: "logits", say.
        has_states: False where the model keeps none (`config.use_cache`).
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model.eval()
        self.layers: Any = getattr(model, model.base_model_prefix, model).layers
        with torch.no_grad():
            outputs = model(self.example()[0])
        self.has_states = outputs.get(STATE) is not None
        self.output_names = [name for name, x in outputs.items() if isinstance(x, Tensor)]

    def example(self, batch: int = 2, time: int = 3) -> tuple[Tensor, ...]:
        """Arguments of `forward`."""
        ids = torch.zeros(batch, time, dtype=torch.long)
        return ids, torch.ones_like(ids)

    def initial_states(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        """The state before the first token: float32 tensors (B, ...), layer by layer; none where there is none."""
        states = [state for layer in self.layers for state in layer.initial_states(batch_size)]
        return tuple(x.detach().contiguous() for x in states) if self.has_states else ()

    def forward(self, inputs: Tensor, attention_mask: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """(B, T) tokens, (B, T) zeros at padding, and the states to the model's outputs and the new states."""
        left = iter(states)
        cache = RecurrentCache(len(self.layers)) if self.has_states else None
        if cache is not None:
            cache.states = [tuple(next(left).clone() for _ in layer.state_shapes) for layer in self.layers]
        given = {self.model.main_input_name: inputs, "attention_mask": attention_mask}
        outputs = self.model(**given, **({} if cache is None else {STATE: cache}))
        new = [] if cache is None else [x for state in cache.states if state is not None for x in state]
        return *(outputs[name] for name in self.output_names), *new


def export_model(model: PreTrainedModel) -> torch.export.ExportedProgram:
    """`StatefulModel` as a program of any batch size and length."""
    whole = StatefulModel(model)
    inputs = whole.example()
    states = whole.initial_states(len(inputs[0]))
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    shapes = [{0: batch, 1: time} for _ in inputs], [{0: batch} for _ in states]
    with torch.no_grad():
        return torch.export.export(whole, (*inputs, *states), dynamic_shapes=(*shapes[0], tuple(shapes[1])))


@torch.no_grad()  # or a loop's gradients would be part of the program
def to_onnx(model: PreTrainedModel, path: str | Path) -> None:
    """Write `StatefulModel` as an ONNX file.

    Raises:
        ImportError: onnx or onnxscript is missing: `pip install 'hf-rnn[onnx]'`.
    """
    from hf_rnn.exchange import onnx_operators as operators

    whole = StatefulModel(model)
    ops = torch.ops.hf_rnn
    program = export_model(model).run_decompositions(
        {
            ops.gated_scan.default: operators.gated_scan,
            ops.recurrent_scan.default: operators.recurrent_scan,
            ops.mlstm_scan.default: operators.mlstm_scan,
            ops.recurrent_layer.default: operators.recurrent_layer,
        }
    )
    states = range(len(whole.initial_states()))
    onnx = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["input_ids", "attention_mask", *(f"state_{i}" for i in states)],
        output_names=[*whole.output_names, *(f"new_state_{i}" for i in states)],
        verbose=False,
    )
    assert onnx is not None
    onnx.save(str(path))
