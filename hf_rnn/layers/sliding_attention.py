import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_rnn.layers.mixer import Mixer
from hf_rnn.skeleton.configuration_hybrid import HybridConfig
from hf_rnn_kernels.layout import SequenceLayout
from hf_rnn_kernels.stepping import record

_NONE = -1  # the sequence of what no token may see


class SlidingAttention(Mixer):
    """Causal attention over the last w real tokens, the token itself included, with rotary positions (arXiv
    2104.09864), a key and a value for each group of queries (arXiv 2305.13245).

    The state is constant: keys before rotation and values of the last w tokens, (B, w, G, P) each, oldest first, and 1
    where there is one, (B, w). Positions count real tokens from the oldest that a block of w queries sees, so that they
    never grow and padding is none.
    """

    keeps_rows = True

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.window, self.heads = config.sliding_window, config.num_attention_heads
        self.groups, self.size = config.num_key_value_heads or self.heads, config.hidden_size // self.heads
        self.theta = float(config.rope_theta)
        width, bias = config.hidden_size, config.use_bias
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=bias)
        self.k_proj = nn.Linear(width, self.groups * self.size, bias=bias)
        self.v_proj = nn.Linear(width, self.groups * self.size, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=bias)
        self.state_shapes = [(self.window, self.groups, self.size)] * 2 + [(self.window,)]

    def to_states(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        raise ValueError(
            "layer_types: attention has no one state to train by memories; expected recurrent layers alone"
        )

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if layout.recorded:
            y, recorded = record(layout, [x], state, lambda layout, inputs, state: self(*inputs, state, layout))
            return y, tuple(recorded)
        shape, mask = x.shape, layout.mask
        of_q = sequences(layout.flat(x), layout.flat_mask(), layout.offsets)
        if layout.continues is None:
            x, mask = layout.flat(x), layout.flat_mask()
        else:  # each row's own sequences, from 0, which is the state's
            of_q = of_q.view(x.shape[:2])
            first = torch.where(of_q == _NONE, torch.iinfo(of_q.dtype).max, of_q).amin(1, keepdim=True)
            of_q = torch.where(of_q == _NONE, _NONE, of_q - first)
        dtype = torch.promote_types(x.dtype, torch.float32)
        empty = (x.new_zeros(x.shape[0], *size, dtype=dtype) for size in self.state_shapes)
        keys, values, filled = empty if state is None else state
        if layout.continues is not None:
            filled = filled * layout.continues[:, None]
        q = self.q_proj(x).unflatten(-1, (self.heads, self.size))
        k, v = (project(x).unflatten(-1, (self.groups, self.size)) for project in (self.k_proj, self.v_proj))
        k, v = torch.cat([keys.to(k.dtype), k], 1), torch.cat([values.to(v.dtype), v], 1)
        of_k = torch.cat([torch.where(filled > 0, 0, _NONE), of_q], 1)
        if mask is None:
            y = self._attend(q, k, v, of_q, of_k)
        else:  # padding in front, then the state, then the real tokens: distances are those of real tokens
            order = mask.long().argsort(dim=1, stable=True)
            kept = torch.cat([mask.new_ones(mask.shape[0], self.window), mask], 1).long().argsort(dim=1, stable=True)
            k, v, of_k = (rows(y, kept) for y in (k, v, of_k))
            y = rows(self._attend(rows(q, order), k, v, rows(of_q, order), of_k), order.argsort(1))
            y = y * mask[..., None, None]  # else padding would give what its place in a piece lets it see
        y = self.o_proj(y.flatten(-2)).view(shape)
        if layout.offsets is not None and layout.continues is None:
            return y, ()
        of_last = of_k[:, -1:] if layout.continues is not None else 0
        seen = (of_k == of_last) & (of_k != _NONE)
        last = [z[:, -self.window :].to(keys.dtype, copy=True) for z in (k, v, seen)]
        if state is None or not layout.in_place or any(z.requires_grad for z in last):
            return y, tuple(last)
        for old, new in zip(state, last, strict=True):
            old.copy_(new)
        return y, state

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor) -> Tensor:
        """q (B, T, H, P), k and v (B, w + T, G, P), whose key w + t is token t's, and the sequences that they are of to
        (B, T, H, P). More than w tokens go in blocks of w, each with the 2 w keys that it may see."""
        batch, time = q.shape[:2]
        # A program for any number of tokens has them in one
        if torch.compiler.is_exporting() or time <= self.window:
            return self._attend_block(q, k, v, of_q, of_k) if time else q
        block, rest = self.window, -time % self.window
        blocks = (time + rest) // block
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, rest)) for x in (q, k, v))
        of_q, of_k = F.pad(of_q, (0, rest), value=_NONE), F.pad(of_k, (0, rest), value=_NONE)
        q, of_q = (x.unflatten(1, (blocks, block)).flatten(0, 1) for x in (q, of_q))
        k, v = (x.unfold(1, 2 * block, block).movedim(-1, 2).flatten(0, 1) for x in (k, v))
        of_k = of_k.unfold(1, 2 * block, block).flatten(0, 1)
        y = self._attend_block(q, k, v, of_q, of_k)
        return y.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :time]

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor) -> Tensor:
        """The same for all tokens at once."""
        place = torch.arange(k.shape[1], device=q.device)
        cosine, sine = rotations(place, self.size, self.theta, q.dtype)
        q = rotate(q, cosine[self.window :], sine[self.window :])
        k = rotate(k, cosine, sine)
        ahead = place[None] - place[self.window :, None]
        seen = (ahead > -self.window) & (ahead <= 0) & (of_q[:, :, None] == of_k[:, None]) & (of_q >= 0)[:, :, None]
        seen = seen | (ahead == 0)  # of no keys the mean is NaN, at padding
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=self.heads != self.groups)
        return y.transpose(1, 2)


def sequences(x: Tensor, mask: Tensor | None, offsets: Tensor | None) -> Tensor:
    """The sequence that each token of x (B, T, D) is part of, from 0, and `_NONE` where `mask` says padding: (B, T)."""
    batch, time = x.shape[:2]
    found = torch.zeros(batch, time, dtype=torch.long, device=x.device)
    if offsets is not None:
        tokens = torch.arange(time, dtype=offsets.dtype, device=x.device)
        found = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)[None]
    return found if mask is None else found.masked_fill(~mask, _NONE)


def rotations(place: Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (T, 1, size / 2), of place / theta^(2 i / size)."""
    exponents = torch.arange(0, size, 2, device=place.device, dtype=torch.float64) / size
    angles = place[:, None, None] / theta**exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x (N, T, H, P), whose channels i and i + P / 2 are a pair, turned by the angle of its place."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, ...) at index (B, T) of each row."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
