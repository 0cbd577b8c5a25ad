"""Attention over the variates of one series, at each step of time for itself."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_rnn.layers import RMSNorm
from hf_rnn.models.tirex2.configuration_tirex2 import TiRex2Config


class Groups(NamedTuple):
    """Series of several variates, G of them with V at most, among the rows of a batch.

    Attributes:
        rows: (M,) which rows these are.
        places: (M,) where they stand in a table of G x V.
        sees: (G, V, V) bool, whether a variate sees another one: targets see all, covariates see covariates. Empty
            places see all that is there.
    """

    rows: Tensor
    places: Tensor
    sees: Tensor

    @classmethod
    def of(cls, group_ids: Tensor, targets: Tensor) -> "Groups | None":
        """Of the series (R,) that rows are of and whether they are targets (R,) bool; None where each has one row."""
        _, series, counts = group_ids.unique(return_inverse=True, return_counts=True)
        rows = (counts[series] > 1).nonzero()[:, 0]
        if not len(rows):
            return None
        _, group, sizes = series[rows].unique(return_inverse=True, return_counts=True)
        order = group.argsort(stable=True)
        number = torch.empty_like(group)
        number[order] = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[group[order]]
        table = len(sizes), int(sizes.max())
        places = group * table[1] + number
        there = targets.new_zeros(table).flatten().index_fill(0, places, True).view(table)
        blind = targets.new_zeros(table).flatten().index_copy(0, places, ~targets[rows]).view(table)
        sees = there[:, None, :] & (blind[:, None, :] | ~blind[:, :, None])
        return cls(rows, places, sees)


class VariateAttention(nn.Module):
    """Softmax attention over variates (M, L, D), which has no order and so no positions."""

    def __init__(self, config: TiRex2Config):
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.qk_norm, self.dropout = config.num_attention_heads, config.qk_norm, config.hidden_dropout
        self.in_proj = nn.Linear(width, 3 * width, bias=False)  # q, k, v
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        time, (tables, variates, _) = x.shape[1], groups.sees.shape
        qkv = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(2)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        q, k, v = (self._tables(y, groups) for y in (q, k, v))
        sees = groups.sees.repeat_interleave(time, 0)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, dropout_p=self.dropout if self.training else 0.0)
        y = y.view(tables, time, self.num_heads, variates, -1).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
        return self.out_proj(y[groups.places])

    def _tables(self, x: Tensor, groups: Groups) -> Tensor:
        """(M, L, H, P) to (G * L, H, V, P), zeros at empty places."""
        tables, variates, _ = groups.sees.shape
        table = x.new_zeros(tables * variates, *x.shape[1:]).index_copy(0, groups.places, x)
        return table.unflatten(0, (tables, variates)).permute(0, 2, 3, 1, 4).flatten(0, 1)


class VariateMixer(nn.Module):
    """x += attention(norm(x)), x += feed-forward(norm(x)); series of one variate stay as they are."""

    def __init__(self, config: TiRex2Config):
        super().__init__()
        width = config.hidden_size
        self.attention_norm = RMSNorm(width, eps=config.norm_eps)
        self.attention = VariateAttention(config)
        self.mlp_norm = RMSNorm(width, eps=config.norm_eps)
        self.mlp_up = nn.Linear(width, 4 * width, bias=False)
        self.mlp_down = nn.Linear(4 * width, width, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        y = x[groups.rows]
        y = y + self.dropout(self.attention(self.attention_norm(y), groups))
        y = y + self.mlp_down(self.dropout(self.activation(self.mlp_up(self.mlp_norm(y)))))
        return x.index_copy(0, groups.rows, y)
