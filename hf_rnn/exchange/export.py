"""One decoding step as a graph of its own, for torch.export and ONNX: a recurrent model is run by repeating it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.modeling_recurrent import RecurrentForCausalLM
from hf_rnn_kernels.gated_scan import reference as gated
from hf_rnn_kernels.mlstm_scan import reference as mlstm
from hf_rnn_kernels.recurrent_scan import reference as recurrent


class DecodingStep(nn.Module):
    """A token and the state before it to logits and the state after it; tensors in, tensors out.

    Args:
        model: a causal language model of this package, in eval mode.
    """

    def __init__(self, model: RecurrentForCausalLM):
        super().__init__()
        self.model = model
        self.layers: Any = model.model.layers

    def initial_states(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        """The state before the first token: float32 tensors (B, ...), layer by layer."""
        states: list[Tensor] = []
        for layer in self.layers:
            states += layer.initial_states(batch_size)
        return tuple(x.detach().contiguous() for x in states)

    def forward(self, input_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """(B, 1) tokens and the states to logits (B, vocab_size) and the new states."""
        left = iter(states)
        cache = RecurrentCache(len(self.layers))
        cache.states = [tuple(next(left).clone() for _ in layer.state_shapes) for layer in self.layers]
        logits = self.model(input_ids, cache=cache).logits[:, -1]
        return logits, *(x for state in cache.states if state is not None for x in state)


def export_step(model: RecurrentForCausalLM, batch_size: int = 1) -> torch.export.ExportedProgram:
    """`DecodingStep` as a program. The batch size is fixed: norms choose their loop by the number of elements."""
    step = DecodingStep(model.eval())
    with torch.no_grad():
        ids = torch.zeros(batch_size, 1, dtype=torch.long)
        return torch.export.export(step, (ids, *step.initial_states(batch_size)))


def to_onnx(model: RecurrentForCausalLM, path: str | Path, batch_size: int = 1) -> None:
    """Write `DecodingStep` as an ONNX file. The package's ops become the equations of their references.

    Inputs are `input_ids` (batch_size, 1) and `state_0`, `state_1`, ... (`DecodingStep.initial_states` at first);
    outputs `logits` (batch_size, vocab_size) and `new_state_0`, ...

    Raises:
        ImportError: onnx or onnxscript is missing: `pip install 'hf-rnn[onnx]'`.
    """
    program = export_step(model, batch_size).run_decompositions(
        {
            torch.ops.hf_rnn.gated_scan.default: gated.scan,
            torch.ops.hf_rnn.recurrent_scan.default: recurrent.scan,
            torch.ops.hf_rnn.mlstm_scan.default: mlstm.scan,
        }
    )
    count = len(DecodingStep(model).initial_states())
    onnx = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["input_ids", *(f"state_{i}" for i in range(count))],
        output_names=["logits", *(f"new_state_{i}" for i in range(count))],
        verbose=False,
    )
    assert onnx is not None
    onnx.save(str(path))
