"""Series as vectors, for any estimator that takes such."""

from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_rnn.forecasting.series import read_series, side_by_side


class EmbeddingMixin:
    """For a model whose `forward` gives `hidden_states` of patches that are counted from the end."""

    config: Any
    device: Any
    reads_variates: bool

    @torch.no_grad()
    def embed(self, series: Any, batch_size: int = 256) -> numpy.ndarray:
        """What the model makes of series: the mean over patches of what each block reads and the last one gives, side
        by side. Of several variates the mean.

        Series are read in their own scale, so that level and deviation are not in it; add them where they matter.

        Args:
            series: as `predict`'s, but for frames. The last `config.context_length` steps are read.
            batch_size: so many series at once.

        Returns:
            (B, (layers + 1) * hidden_size) float32, as scikit-learn's estimators take them.
        """
        found = read_series(series, None, None, 0)
        parts = []
        for first in range(0, len(found), batch_size):
            rows = side_by_side(found[first : first + batch_size], 0)
            values = rows.values[:, -self.config.context_length :].to(self.device)
            options = {"group_ids": rows.series.to(self.device)} if self.reads_variates else {}
            forecast = self(past_values=values, horizon=1, output_hidden_states=True, **options)  # type: ignore[operator]
            x = torch.cat([h.float() for h in forecast.hidden_states], -1)
            mean = mean_of_patches(x, values, self.config.patch_size)
            counts = rows.series.bincount()
            parts.append(torch.stack([part.mean(0) for part in mean.cpu().split(counts.tolist())]))
        return torch.cat(parts).numpy()


def mean_of_patches(x: Tensor, values: Tensor, size: int) -> Tensor:
    """The mean of outputs (R, L, D) over the patches that have any of the values (R, T): (R, D); 0 where none has."""
    there = F.pad(~values.isnan(), (-values.shape[1] % size, 0)).unflatten(1, (-1, size)).any(2)
    x = x[:, -there.shape[1] :] * there[..., None]
    return x.sum(1) / there.sum(1, keepdim=True).clamp_min(1)
