"""A token as one compiled call, for a model that is what its parts say it is; and why another one is not."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.utils import logging, output_capturing

from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn_kernels import threads
from hf_rnn_kernels.fused_step import NotFusable, Program, run
from hf_rnn_kernels.transforms import transforming

logger = logging.get_logger(__name__)

# Tokens of one text that are one compiled call where their states are recorded: of more, ordinary passes are as fast
# (docs/log.md, 2026-11-30)
FUSED_TOKENS = 32
_TORCH = {nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.ModuleList}
_CAPTURING = output_capturing.__name__
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SETTINGS = ("eps", "max_norm", "soft_cap")  # what programs read of modules beside parameters
_FORKED = "numba is missing, or this process was forked from one in which compiled loops had run"


class FusedStep:
    """The program of a model's token and all that it depends on; or the reason why there is none.

    Attributes:
        program: None where there is none.
        reason: why; "" where there is one.
    """

    def __init__(self, model: Any):
        modules = list(model.modules())
        self._modules = modules
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        named = [(d, name, x) for m in modules for d in (m._parameters, m._buffers) for name, x in d.items()]
        self._tensors = [(d, name, x) for d, name, x in named]
        self._present = [(x, x.data_ptr(), x.numel(), x.dtype) for _, _, x in named if x is not None and not x.is_meta]
        self._hooks = [getattr(m, name) for m in modules for name in _HOOKS]
        self._attributes = [vars(m) for m in modules]
        self._settings = [(d, name, d[name]) for d in self._attributes for name in _SETTINGS if name in d]
        self._config, self._config_was = vars(model.config), dict(vars(model.config))
        self._is_wrapped = self._wrapped()
        # Reading a setting of a config takes microseconds
        self._model_type = model.config.model_type
        self._shapes = [[torch.Size(shape) for shape in layer.state_shapes] for layer in model.model.layers]
        self.program: Program | None = None
        self.reason = ""
        try:
            self.program = self._fused(model)
        except NotFusable as error:
            self.reason = str(error)
        logger.info(f"{type(model).__name__}: {f'ordinary step, {self.reason}' if self.reason else 'fused step'}")

    def _fused(self, model: Any) -> Program:
        for module in self._modules:
            kind = type(module)
            if kind not in _TORCH and kind.__module__.partition(".")[0] not in ("hf_rnn", "hf_rnn_kernels"):
                raise NotFusable(f"a {kind.__name__} of {kind.__module__}")
        if self._is_wrapped:
            raise NotFusable("hooks, or a forward of its own")
        if wrong := [name for _, name, x in self._tensors if type(x) not in (nn.Parameter, Tensor, type(None))]:
            raise NotFusable(f"{wrong[0]} is no plain parameter")
        widths = [shape.numel() for shapes in self._shapes for shape in shapes]
        program = Program(widths, model.config.vocab_size)
        model.fuse(program)
        return program

    def _wrapped(self) -> bool:
        hooks = (hook for hooks in self._hooks if hooks for hook in hooks.values())
        # Those of transformers that capture hidden states stay when they were once asked for
        others = any(hook.__module__ != _CAPTURING for hook in hooks)
        return others or any("forward" in attributes or "logits" in attributes for attributes in self._attributes)

    def is_current(self) -> bool:
        """Whether the model still is what it was: its modules, hooks and settings, parameters and where these lie."""
        return (
            all(d.get(name) is child for d, name, child in self._children)
            and all(d.get(name) is x for d, name, x in self._tensors)
            and all(  # in line: it is what a token costs beside the compiled call
                x.data_ptr() == address and x.numel() == count and x.dtype is dtype and x.is_contiguous()
                for x, address, count, dtype in self._present
            )
            and all(d.get(name) == value for d, name, value in self._settings)
            and self._config == self._config_was
            and self._wrapped() == self._is_wrapped
        )

    def is_training(self) -> bool:
        return any(attributes["training"] for attributes in self._attributes)

    def states_of(self, cache: RecurrentCache, batch: int) -> list[Tensor] | None:
        """The state's tensors if they are this model's and may be written to where they lie."""
        if cache.model_type != self._model_type or len(cache) != len(self._shapes) or not cache.is_writable:
            return None
        found = []
        for state, shapes in zip(cache.states, self._shapes, strict=True):
            if len(state) != len(shapes):  # type: ignore[arg-type]
                return None
            for x, shape in zip(state, shapes, strict=True):  # type: ignore[arg-type]
                size = x.shape
                if size[0] != batch or size[1:] != shape or x.dtype != torch.float32:
                    return None
                if not (x.is_cpu and x.is_contiguous()):
                    return None
                found.append(x)
        return found

    def __deepcopy__(self, memo: dict) -> None:
        return None  # another model's weights lie elsewhere

    def __reduce__(self):
        return type(None), ()


def fused_step(model: Any) -> FusedStep:
    """The model's, made anew where it has changed."""
    step = model.__dict__.get("_fused_step")
    if step is None or not step.is_current():
        step = model.__dict__["_fused_step"] = FusedStep(model)
    return step


def reason_not_fused(model: Any) -> str:
    """Why a model's tokens take the ordinary path; "" where they do not."""
    if not threads.available():
        return _FORKED
    step = fused_step(model)
    if step.reason:
        return step.reason
    if step.is_training():
        return "training mode; model.eval() ends it"
    if model.config.output_hidden_states:
        return "config.output_hidden_states"
    return "autocast" if torch.is_autocast_enabled("cpu") else ""


def decode_fused(model: Any, input_ids: Tensor, cache: RecurrentCache) -> Tensor | None:
    """Logits (B, 1, V) of one more token a row, or (1, T, V) of several of one row where `cache` records, and the state
    in it after them; None where the ordinary path is to take them: gradients, transforms, compilers, autocast, another
    device or dtype, modules without instructions, and whatever that path has an error for."""
    if (
        torch.is_grad_enabled()
        or type(input_ids) is not Tensor
        or input_ids.dtype != torch.int64
        or input_ids.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or transforming()
        or torch.is_autocast_enabled("cpu")
        or is_in_torch_dispatch_mode()
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    ):
        return None
    if not threads.available():
        logger.warning_once(f"tokens take the ordinary path: {_FORKED}")
        return None
    step = fused_step(model)
    if step.program is None or step.is_training():
        return None
    ids = input_ids.reshape(-1).contiguous()
    batch, time = input_ids.shape
    numbers, states = ids.tolist(), step.states_of(cache, batch)
    if states is None or not numbers or min(numbers) < 0 or max(numbers) >= step.program.num_embeddings:
        return None
    logits = torch.empty(batch, time, step.program.logits.width, dtype=torch.float32, device="cpu")
    cache.record(time)
    if time == 1:
        run(step.program, ids, states, logits)
        if not torch.is_inference_mode_enabled():
            for state in states:  # autograd is told, as of any write
                increment_version(state)
        cache.advance_by(1, model.model)
        return logits
    every = [x.new_empty(time, *x.shape[1:]) for x in states]
    for after, before in zip(every, states, strict=True):
        after[0] = before[0]
    run(step.program, ids, every, logits, one_text=True)
    rest = iter(every)
    cache.states = [tuple(next(rest)[None] for _ in shapes) for shapes in step._shapes]
    cache.advance_by(time, model.model)
    cache.record_each(time)
    return logits
