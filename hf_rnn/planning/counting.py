"""Bytes and operations of a step, counted while the real model runs on the meta device: shapes without numbers."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hf_rnn.layers import SlidingAttention
from hf_rnn_kernels import Perturbed  # noqa: F401  its ops know the meta device


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, the most there were (`peak`), and how many operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.operations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.operations += 1
        for x in tree_leaves(outputs):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Count:
    """Of a step, for each item (a token, or a memory) of a batch.

    Attributes:
        bytes: at the peak, beyond weights, gradients and what does not grow with the batch.
        flops: of matrix products but those inside recurrences.
    """

    bytes: float
    flops: float


def count(run: Callable[[int], Any], sizes: tuple[int, int]) -> Count:
    """What `run(n)` takes for each of n items: the slope between two sizes, large enough for the batch to matter more
    than a gradient of the head's weights. On the meta device large ones cost no more than small ones."""
    found = [_totals(run, size) for size in sizes]
    return Count(*((b - a) / (sizes[1] - sizes[0]) for a, b in zip(found[0], found[1], strict=True)))


def _totals(run: Callable[[int], Any], size: int) -> tuple[int, int]:
    flops = FlopCounterMode(display=False)
    with flops, LiveBytes() as memory:
        run(size)
    return memory.peak, flops.get_total_flops()


def operations(run: Callable[[int], Any], sizes: tuple[int, int] = (2, 4)) -> float:
    """Kernels that each further token waits for, where time is a loop: calls of `run(tokens)` for each token."""
    found = []
    for size in sizes:
        with LiveBytes() as memory:
            run(size)
        found.append(memory.operations)
    return (found[1] - found[0]) / (sizes[1] - sizes[0])


def on_meta(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A model without weights, whose gradients are not kept: they are counted by themselves."""
    with torch.device("meta"):
        return drop_gradients(make().to(dtype))


def drop_gradients(model: Any) -> Any:
    """The same model, each gradient gone as soon as it is there."""
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return model


def recurrence_flops(model: Any) -> float:
    """Forward, for each token: products with the state, which are inside the ops and not counted otherwise."""
    total = 0.0
    for module in model.modules():
        if isinstance(module, SlidingAttention):
            continue  # torch's own product, counted
        if isinstance(weight := getattr(module, "recurrent_weight", None), Tensor):
            total += 2 * weight.numel()
        shapes = getattr(module, "state_shapes", None) or [()]
        if len(shapes[0]) == 3 and not hasattr(module, "mixer"):  # mLSTM: k v^T into, q out of, and chunks of 64
            heads, keys, values = shapes[0]
            total += heads * (4 * keys * values + 2 * 64 * (keys + values))
    return total * _uses(model)


def recurrent_layers(model: Any) -> int:
    """Layers whose steps wait for one another inside one kernel."""
    return _uses(model) * sum(isinstance(getattr(m, "recurrent_weight", None), Tensor) for m in model.modules())


def _uses(model: Any) -> int:
    """Of each recurrence: both directions' where they share one."""
    return 2 if model.config.bidirectional and model.config.share_directions else 1


def backpropagation(model: Any, rows: int = 1) -> Callable[[int], None]:
    """Forward and backward of rows of n tokens, logits and their loss in float32 as transformers has it."""
    dtype, width = model.lm_head.weight.dtype, model.config.hidden_size

    def run(n: int) -> None:
        x = torch.empty(rows, n, width, device="meta", dtype=dtype, requires_grad=True)
        hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
        _loss(model.logits(hidden)).backward()

    return run


def evaluation(model: Any) -> Callable[[int], None]:
    """Forward of one row of n tokens, without gradients and without the head."""
    dtype, width = model.lm_head.weight.dtype, model.config.hidden_size

    @torch.no_grad()
    def run(n: int) -> None:
        model.model(inputs_embeds=torch.empty(1, n, width, device="meta", dtype=dtype), use_cache=True)

    return run


def memory_training(student: Any, teacher: Any, context: int, future: int) -> Callable[[int], None]:
    """Forward and backward of n memories of SMT: two contexts encoded, a future decoded, a step and a readout made."""
    tokens = student.memory_shape[0]
    width, dtype = teacher.config.hidden_size, teacher.lm_head.weight.dtype

    def run(n: int) -> None:
        past = torch.empty(2 * n, context + tokens, width, device="meta", dtype=dtype, requires_grad=True)
        seen = teacher.encoder(inputs_embeds=past, attention_mask=_mask(past)).last_hidden_state
        memory = teacher._normalized(seen[:, context:])
        before, after = student.to_memory(memory).chunk(2)
        ids = torch.empty(n, dtype=torch.long, device="meta")
        moved = student.update_memory(before, ids)
        ahead = torch.empty(n, future - 1, width, device="meta", dtype=dtype)
        x = torch.cat([teacher.from_memory(after.to(dtype)), ahead], 1)
        seen = teacher.decoder(inputs_embeds=x, attention_mask=_mask(x)).last_hidden_state
        logits = teacher.lm_head(seen[:, tokens - 1 :])
        readout = student.read_memory(after.detach(), ids)
        (_loss(logits) + _loss(readout) + (moved - after).square().mean()).backward()

    return run


def _mask(x: Tensor) -> Tensor:
    """Of attention, ready made: transformers would look at its values to make one."""
    return torch.empty(len(x), 1, x.shape[1], x.shape[1], dtype=torch.bool, device="meta")


def _loss(logits: Tensor) -> Tensor:
    logits = logits.float().flatten(0, -2)
    return nn.functional.cross_entropy(logits, torch.empty(len(logits), dtype=torch.long, device="meta"))
