"""A whole model as one program, for torch.export and ONNX: any batch, any length, the state handed on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_rnn._version import __version__
from hf_rnn.exchange.onnx_operators import TABLE
from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel
from hf_rnn.skeleton.versions import STATE
from hf_rnn_kernels.packed_linear import PackedLinear, PackedMatrix


class StatefulModel(nn.Module):
    """A model with tensors alone in and out.

    Args:
        model: any of this package, in float32 on the CPU, which is put in eval mode.
        padding: whether `forward` takes an attention_mask. Not by default, for looking after padding takes time where
            there is none.

    Attributes:
        input_names, output_names: of what `forward` takes and returns: the model's, such as "input_ids" and "logits",
            then "state_0", "state_1", ... and "new_state_0", ... where it keeps a state (`config.use_cache`).

    Raises:
        TypeError, ValueError: a model that does not export, with the reason.
    """

    def __init__(self, model: RecurrentPreTrainedModel, padding: bool = False):
        super().__init__()
        check_exportable(model)
        self.model, self.padding = model.eval(), padding
        self.reads = "input_ids" if model.config.num_input_features is None else "input_features"
        backbone: Any = model.base_model
        self.layers = backbone.layers
        with torch.no_grad():
            outputs = model(**self._given(self.example()))
        self.state_count = sum(len(layer.state_shapes) for layer in self.layers) if outputs.get(STATE) else 0
        self.outputs = [name for name, x in outputs.items() if isinstance(x, Tensor)]

    @property
    def input_names(self) -> list[str]:
        masks = ["attention_mask"] * self.padding
        return [self.reads, *masks, *(f"state_{i}" for i in range(self.state_count))]

    @property
    def output_names(self) -> list[str]:
        return [*self.outputs, *(f"new_state_{i}" for i in range(self.state_count))]

    def example(self, batch: int = 2, time: int = 3) -> list[Tensor]:
        """Tokens (B, T), none of them padding, or features (B, T, F); with `padding` a mask of ones."""
        ones, config = torch.ones(batch, time, dtype=torch.long), self.model.config
        width, token = config.num_input_features, int(config.pad_token_id == 0)
        inputs = token * ones if width is None else torch.zeros(batch, time, width)
        return [inputs, ones] if self.padding else [inputs]

    def initial_states(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        """The state before the first token: float32 tensors (B, ...), layer by layer; none where the model has none."""
        if not self.state_count:
            return ()
        states = [state for layer in self.layers for state in layer.initial_states(batch_size)]
        return tuple(x.detach().contiguous() for x in states)

    def _given(self, tensors) -> dict[str, Tensor]:
        return dict(zip([self.reads, "attention_mask"], tensors, strict=False))

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


def export_model(model: RecurrentPreTrainedModel, padding: bool = False) -> torch.export.ExportedProgram:
    """`StatefulModel` as a program for any batch size and length.

    Raises:
        TypeError, ValueError: a model that does not export, with the reason.
    """
    return _program(StatefulModel(model, padding))


def _program(whole: StatefulModel) -> torch.export.ExportedProgram:
    patch = whole.model.config.patch_size
    inputs = whole.example(time=2 * patch + 1)
    states = whole.initial_states(len(inputs[0]))
    # Whether there is more than one patch is asked for
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", min=1 if patch == 1 else patch + 1)
    dynamic = *({0: batch, 1: time} for _ in inputs), *({0: batch} for _ in states)
    with torch.no_grad():
        return torch.export.export(whole, (*inputs, *states), dynamic_shapes=(dynamic,))


@torch.no_grad()  # or a loop's gradients would be part of the program
def to_onnx(model: RecurrentPreTrainedModel, path: str | Path, padding: bool = False) -> None:
    """Write a model as an ONNX file: a prompt of any length, a batch of any size, and a token with the state before it.

    Inputs and outputs are those of `StatefulModel`, under its `input_names` and `output_names`. Weights of more than
    1.5 GB lie in a second file beside it, `path` + ".data".

    Args:
        padding: whether the file takes an `attention_mask`, as `StatefulModel` does.

    Raises:
        ImportError: onnx or onnxscript is missing: `pip install 'hf-rnn[onnx]'`.
        TypeError, ValueError: a model that does not export, with the reason.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    whole = StatefulModel(model, padding)
    found = torch.onnx.export(
        _program(whole).run_decompositions(TABLE),
        dynamo=True,
        input_names=whole.input_names,
        output_names=whole.output_names,
        verbose=False,
    )
    assert found is not None
    told = dict(hf_rnn=__version__, model_type=model.config.model_type, architecture=type(model).__name__)
    found.model.metadata_props.update(told)
    RemoveUnusedNodesPass()(found.model)  # and constants, of which onnxruntime would warn
    found.save(str(path))


def check_exportable(model: nn.Module) -> None:
    """Raise TypeError or ValueError for a model that does not export, with the reason."""
    if not isinstance(model, RecurrentPreTrainedModel):
        raise TypeError(f"model: expected one of this package, got a {type(model).__name__}")
    if model.device.type != "cpu":
        raise ValueError(f"model: expected on the CPU, got {model.device}; model.cpu()")
    if any(isinstance(module, PackedLinear | PackedMatrix) for module in model.modules()):
        raise ValueError("model: expected plain weights, got packed ones; model.dequantize()")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"model: expected float32, got {name} in {parameter.dtype}; model.float()")
    if getattr(model.config, "projection_size", None) is not None:
        raise ValueError("projection_size: expected none, torch's loop over a projected state does not export")
