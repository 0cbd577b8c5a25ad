"""Backpropagation over pieces of a long sequence: the gradient itself, at the memory of one piece, or truncated."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_rnn_kernels.layout import check_offsets

_OFFSETS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}

State = Any  # a model's cache: `states`, a tuple of tensors or None for each layer
Gradient = list[Tensor | None]  # of each tensor of a state


class BackpropOverPieces(Trainer):
    """Trainer whose step goes over pieces of `chunk_size` tokens, and from batch to batch with a state (`carried`).

    chunked: a pass without a graph keeps the states between pieces. Then, from the last piece to the first, each is run
    again with a graph, and backpropagation starts from its loss and from the gradient of the state that it hands on,
    which the piece after it gave: the gradient of the whole, sum for sum. truncated: from the first piece to the last,
    each from the state before it as a constant.

    A loss is `compute_loss` of a piece, with `shift_labels`, so that the last token of a piece predicts the first of
    the next, and with its state under `past_key_values`. One of your own gives the model all that it is given, and
    divides the sum over `shift_labels` by `num_items_in_batch`, the targets of the whole step; where the state does not
    move on it is refused. Dropout's masks are drawn from a seed of the piece's own, the same each time.
    """

    args: Any
    carried: State | None = None  # after the batch before; only of streams
    _begun = False  # whether the run has had a batch

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        if not (self.in_pieces or self.streams):
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()  # type: ignore[union-attr]
        inputs = self._prepare_inputs(inputs)
        batch, time = tokens_of(inputs)
        if num_items_in_batch is None:
            raise ValueError("num_items_in_batch: expected the number of a step's targets, as Trainer counts them")
        size = self.args.chunk_size or time
        if size > time and not self._begun and self.state.global_step == 0:  # shorter rows may come later
            raise ValueError(f"chunk_size: expected at most the {time} tokens of the first batch's rows, got {size}")
        self._begun = True
        steps = _Steps(self, model, shifted(inputs, batch, time), min(size, time), num_items_in_batch)
        if self.args.backprop == "truncated":
            loss, after = steps.truncated(self._state(model), self.args.gradient_chunks)
        else:
            loss, after = steps.chunked(self._state(model), self.args.chunk_states)
        if self.streams and all(bool(x.isfinite().all()) for x in tensors(after)):  # else a step to be skipped
            self.carried = after
        return loss

    @property
    def in_pieces(self) -> bool:
        return getattr(self.args, "backprop", "full") != "full"

    @property
    def streams(self) -> bool:
        return getattr(self.args, "stream", False)

    @torch.no_grad()
    def measure(self, model, inputs: dict[str, Any], state: State) -> tuple[Tensor, Tensor]:
        """Summed loss of a batch, and its targets; the state goes on."""
        batch, time = tokens_of(inputs)
        size = min(self.args.chunk_size or time, time)
        steps = _Steps(self, model, shifted(inputs, batch, time), size, 1)
        total = torch.zeros((), dtype=torch.float64, device=inputs["labels"].device)
        for i in range(steps.count):
            piece = steps.piece(i) | {"past_key_values": state, "use_cache": True, "num_items_in_batch": 1}
            with self.compute_loss_context_manager():
                total = total + model(**piece).loss.double()
        return total, (steps.inputs["shift_labels"] != -100).sum()

    def _state(self, model) -> State:
        """To start a batch from."""
        return self.accelerator.unwrap_model(model).new_cache() if self.carried is None else copy.deepcopy(self.carried)

    def check_pieces(self) -> None:
        """Raise ValueError for a model, a loss or a set-up that cannot do with pieces."""
        name = "stream" if self.streams and not self.in_pieces else "backprop"
        if not hasattr(self.accelerator.unwrap_model(self.model), "new_cache"):
            raise ValueError(
                f"{name}: expected a causal language model of hf_rnn, whose state can be handed on, got a "
                f"{type(self.model).__name__}"
            )
        if self.compute_loss_func is not None or self.label_smoother is not None:
            what = "compute_loss_func" if self.label_smoother is None else "label_smoothing_factor"
            raise ValueError(
                f"{what}: it shifts labels within a piece, and would lose the one between two; leave it out"
            )
        if getattr(self, "loss_is_scaled_for_ga", None) is False:
            raise ValueError(f"loss_is_scaled_for_ga: {name} wants a loss that num_items_in_batch divides")
        if self.args.n_gpu > 1:
            raise ValueError(f"{name}: DataParallel splits no state; start a process for each GPU")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(f"{name}: DeepSpeed and FSDP count backward passes of their own; use plain processes")


class _Steps:
    """The pieces of one batch."""

    def __init__(self, trainer: BackpropOverPieces, model, inputs: dict[str, Any], size: int, targets):
        self.trainer, self.model, self.inputs, self.size, self.targets = trainer, model, inputs, size, targets
        self.time = inputs["shift_labels"].shape[1]
        self.count = -(-self.time // size)
        self.seed = int(torch.randint(2**62, ())) if torch.is_grad_enabled() else 0
        self.loss = inputs["shift_labels"].new_zeros((), dtype=torch.float32)
        self.last: State = None  # after the last piece

    def chunked(self, state: State, kept: int | None) -> tuple[Tensor, State]:
        """The loss, its gradient added to the parameters', and the state at the end."""
        backward_through(self.count, state, kept, self._advance, self._backward, Shelf)
        return self.loss, self.last

    def truncated(self, state: State, reach: int) -> tuple[Tensor, State]:
        """The same with gradients that reach back through so many pieces."""
        for i in range(self.count):
            first = max(0, i - reach + 1)
            inputs = self._of(slice(first * self.size, (i + 1) * self.size))
            inputs["shift_labels"][:, : (i - first) * self.size] = -100  # theirs have had their turn
            after = copy.deepcopy(state)
            with self._synchronised(i == self.count - 1), self._randomness(i):
                self._run(inputs, after, [])
            if i - first == reach - 1 and reach > 1:  # the next span begins a piece later
                state = self._advance(first, state)
            elif reach == 1:
                state = after.detach()
        return self.loss, after.detach()

    def _advance(self, i: int, state: State) -> State:
        """The state after piece i."""
        after, inputs = copy.deepcopy(state), self.piece(i)
        del inputs["labels"], inputs["shift_labels"]
        inputs |= {"past_key_values": after, "use_cache": True, "logits_to_keep": 1}
        with torch.no_grad(), self._randomness(i), self.trainer.compute_loss_context_manager():
            self.model(**inputs)
        return after

    def _backward(self, i: int, state: State, gradient: Gradient) -> Gradient:
        """The gradient of the state before piece i, of that of the state after it; adds the parameters'."""
        after = copy.deepcopy(state)
        leaves = [x.requires_grad_() for x in tensors(after)] if i else []
        with self._synchronised(i == 0), self._randomness(i):
            self._run(self.piece(i), after, gradient)
        if i == self.count - 1:
            self.last = after.detach()
        return [x.grad for x in leaves]

    def _run(self, inputs: dict[str, Any], state: State, gradient: Gradient) -> None:
        """A piece with a graph, and back through it; `state` becomes the one after it."""
        trainer, seen = self.trainer, state.seen_tokens
        inputs |= {"past_key_values": state, "use_cache": True}
        with trainer.compute_loss_context_manager():
            loss: Any = trainer.compute_loss(self.model, inputs, num_items_in_batch=self.targets)
        if state.seen_tokens == seen:
            raise ValueError(
                "compute_loss: the state did not move on; expected the model to be given all inputs, past_key_values "
                "among them"
            )
        pairs = [(x, g) for x, g in zip(tensors(state), gradient, strict=False) if g is not None and x.requires_grad]
        self.loss = self.loss + loss.detach()
        loss = _HandedOn.apply(loss, [g for _, g in pairs], *(x for x, _ in pairs))
        trainer.accelerator.backward(loss)

    def piece(self, i: int) -> dict[str, Any]:
        return self._of(slice(i * self.size, (i + 1) * self.size))

    def _of(self, span: slice) -> dict[str, Any]:
        """The batch's tokens `span`."""
        cut = {}
        for name, x in self.inputs.items():
            per_token = torch.is_tensor(x) and x.dim() > 1 and x.shape[1] == self.time
            cut[name] = x[:, span].clone() if name == "shift_labels" else x[:, span] if per_token else x
        return cut

    def _synchronised(self, last: bool):
        """Gradients are exchanged between processes with the last backward pass."""
        return contextlib.nullcontext() if last else self.trainer.accelerator.no_sync(self.model)

    @contextlib.contextmanager
    def _randomness(self, i: int):
        device = self.trainer.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed + i)
            yield


class _HandedOn(torch.autograd.Function):
    """A loss whose backward pass starts from the gradients of states as well. Those are not multiplied by the loss's
    own gradient: they came from one that was, by a scaler's factor for one."""

    @staticmethod
    def forward(ctx, loss, gradients, *states):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None, *ctx.gradients


def backward_through(
    count: int,
    state: State,
    kept: int | None,
    advance: Callable[[int, State], State],
    backward: Callable[[int, State, Gradient], Gradient],
    shelf: Callable[[int], Any] = lambda count: [],
) -> Gradient:
    """Go back through pieces 0 to count - 1, the first of which begins with `state`.

    Args:
        kept: states between pieces that are kept at once; None: all. With fewer than there are pieces, they are those
            between groups of pieces, and each group is run once more to have its own (T. Chen et al., 1604.06174).
        advance: (i, the state before piece i) to the one after it.
        backward: (i, the state before piece i, the gradient of the one after it) to the gradient of the one before it.
        shelf: makes the place of so many states, with a list's `append` and `pop`.

    Returns:
        The gradient of `state`.
    """

    def through(first: int, end: int, state: State, gradient: Gradient) -> Gradient:
        if end - first == 1:
            return backward(first, state, gradient)
        size = 1 if kept is None else -(-(end - first) // kept)
        groups = -(-(end - first) // size)
        states, before = shelf(groups - 1), state
        for i in range(first, first + (groups - 1) * size):
            state = advance(i, state)
            if (i + 1 - first) % size == 0:
                states.append(state)
        for number in reversed(range(groups)):
            start = first + number * size
            gradient = through(start, min(start + size, end), states.pop() if number else before, gradient)
        return gradient

    return through(0, count, state, [])


class Shelf:
    """A list of at most `count` states in one piece of memory: small ones that stay, between what comes and goes, would
    keep a heap from giving anything back (330 MiB of minGRU's 128 states; docs/log.md, 2026-11-30)."""

    def __init__(self, count: int):
        self.count, self.size = count, 0
        self.rows: list[Tensor] = []
        self.like: State = None

    def append(self, state: State) -> None:
        if self.like is None:
            self.like = state
            self.rows = [x.new_empty(self.count, *x.shape) for x in tensors(state)]
        for row, x in zip(self.rows, tensors(state), strict=True):
            row[self.size].copy_(x)
        self.size += 1

    def pop(self) -> State:
        self.size -= 1
        state, rows = copy.deepcopy(self.like), iter(self.rows)
        state.states = [tuple(next(rows)[self.size] for _ in layer) for layer in state.states]
        return state


def tensors(state: State) -> list[Tensor]:
    """A state's, layer by layer."""
    return [x for layer in state.states if layer is not None for x in layer]


def tokens_of(inputs: dict[str, Any]) -> tuple[int, int]:
    """B and T of a batch with labels.

    Raises:
        ValueError: there are none, or of another shape than the tokens.
    """
    labels = inputs.get("labels")
    if not torch.is_tensor(labels) or labels.dim() != 2 or labels.shape[1] == 0:
        raise ValueError("labels: expected (B, T) labels of a language model in each batch, to cut into pieces")
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if tokens is not None and tokens.shape[:2] != labels.shape:
        raise ValueError(
            f"labels: expected the shape {tuple(tokens.shape[:2])} of the tokens, got {tuple(labels.shape)}"
        )
    return labels.shape[0], labels.shape[1]


def shifted(inputs: dict[str, Any], batch: int, time: int) -> dict[str, Any]:
    """A batch whose pieces mean the same each for itself: labels shifted, and where a packed sequence starts told by
    position 0."""
    inputs = dict(inputs)
    if inputs.get("shift_labels") is None:
        inputs["shift_labels"] = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    inputs["shift_labels"] = inputs["shift_labels"].long()
    if (offsets := inputs.get("cu_seq_lens_q")) is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q: packed sequences lie in a batch of one, got a batch of {batch}")
        check_offsets("cu_seq_lens_q", offsets, time)
        number = torch.searchsorted(offsets[1:].long(), torch.arange(time, device=offsets.device), right=True)[None]
        if (mask := inputs.get("attention_mask")) is not None:  # a sequence starts at its first real token
            number = torch.where(mask.bool(), number, -1).cummax(1).values
        inputs["position_ids"] = torch.nn.functional.pad((number[:, 1:] == number[:, :-1]).long(), (1, 0))
    elif inputs.get("seq_idx") is not None and inputs.get("position_ids") is None:
        number = inputs["seq_idx"]
        if number.dim() != 2 or number.shape[1] != time:
            raise ValueError(f"seq_idx: expected shape (B, T) = {(batch, time)} or (1, T), got {tuple(number.shape)}")
        inputs["position_ids"] = torch.nn.functional.pad((number[:, 1:] == number[:, :-1]).long(), (1, 0))
    if inputs.get("position_ids") is not None and inputs["position_ids"].shape[0] != batch:
        inputs["position_ids"] = inputs["position_ids"].expand(batch, -1)
    return {name: x for name, x in inputs.items() if name not in _OFFSETS}
