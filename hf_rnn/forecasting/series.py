"""What users have, series with and without covariates, as rows of one batch, and forecasts as what they have."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from hf_rnn_kernels.checks import values_known


class Series(NamedTuple):
    """One series.

    Attributes:
        target: (V, T), what is to be predicted.
        past: (C, T), covariates known up to now.
        future: (K, T + horizon), covariates known beforehand.
    """

    target: Tensor
    past: Tensor
    future: Tensor


class Rows(NamedTuple):
    """Series side by side, as a model's `forward` takes them; rows of one series follow one another, targets first.

    Attributes:
        values: (R, T), NaN in front of shorter ones.
        future: (R, horizon), NaN but for covariates known beforehand.
        series: (R,) which series it is.
        targets: (R,) bool.
        starts: (R,) the step at which a row begins.
    """

    values: Tensor
    future: Tensor
    series: Tensor
    targets: Tensor
    starts: Tensor


def read_series(series: Any, past: Any, future: Any, horizon: int) -> list[Series]:
    """The series that an array or a list of arrays holds.

    Args:
        series: (T,) one; (B, T) of one variate each; (B, V, T); or a list of (T,) and (V, T).
        past, future: in the same way, (C, T) and (K, T + horizon) of each, or (T,) where there is one; None, also for
            one of a list, where there is none.

    Raises:
        TypeError, ValueError: something else, named with its place in the list.
    """
    targets = _split("series", series, one=_dims(series) == 1)
    if not targets:
        raise ValueError("series: expected at least one, got none")
    single = _dims(series) == 1
    covariates = {"past_covariates": (past, 0), "future_covariates": (future, horizon)}
    given = {}
    for name, (x, _) in covariates.items():
        given[name] = [None] * len(targets) if x is None else _split(name, x, one=single)
        if len(given[name]) != len(targets):
            raise ValueError(f"{name}: expected those of {len(targets)} series, got {len(given[name])}")
    found = []
    for index, x in enumerate(targets):
        target = _variates(f"series[{index}]", x)
        rest = []
        for name, (_, more) in covariates.items():
            here, steps = f"{name}[{index}]", target.shape[1] + more
            y = given[name][index]
            y = target.new_empty(0, steps) if y is None else _variates(here, y)
            if y.shape[1] != steps:
                what = "the series' steps and the horizon's" if more else "the series' steps"
                raise ValueError(f"{here}: expected {what}, {steps} in all, got {y.shape[1]}")
            rest.append(y)
        found.append(Series(target, *rest))
    return found


def _dims(x: Any) -> int:
    return x.ndim if isinstance(x, Tensor | ndarray) else 0


def _split(name: str, x: Any, one: bool) -> list[Any]:
    if isinstance(x, list | tuple):
        return list(x)
    if not isinstance(x, Tensor | ndarray):
        raise TypeError(f"{name}: expected a tensor, a numpy array or a list of these, got a {type(x).__name__}")
    if not 1 <= x.ndim <= 3:
        raise ValueError(f"{name}: expected (T,), (B, T) or (B, V, T), got {tuple(x.shape)}")
    return [x] if one else list(x)


def _variates(name: str, x: Any) -> Tensor:
    """(T,) or (V, T) to floating (V, T)."""
    if not isinstance(x, Tensor | ndarray):
        raise TypeError(f"{name}: expected a tensor or a numpy array, got a {type(x).__name__}")
    x = torch.as_tensor(x.copy() if isinstance(x, ndarray) else x)  # of those that are read backwards or only
    if x.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    x = x if x.dtype == torch.float64 else x.float()
    x = x[None] if x.dim() == 1 else x
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"{name}: expected (T,) or (V, T) with at least one step, got {tuple(x.shape)}")
    if bool(x.isinf().any()):
        variate, step = x.isinf().nonzero()[0].tolist()
        raise ValueError(f"{name}: expected finite values, or NaN, got infinity in variate {variate}, step {step}")
    return x


def side_by_side(found: Sequence[Series], horizon: int) -> Rows:
    """Series as rows of one batch."""
    longest = max(one.target.shape[1] for one in found)
    values, futures, counts, targets, starts = [], [], [], [], []
    for target, past, future in found:
        steps = target.shape[1]
        rows = torch.cat([target, past, future[:, :steps]])
        values.append(F.pad(rows, (longest - steps, 0), value=torch.nan))
        unknown = rows.new_full((len(target) + len(past), horizon), torch.nan)
        futures.append(torch.cat([unknown, future[:, steps:]]))
        counts.append(len(rows))
        targets += [True] * len(target) + [False] * (len(past) + len(future))
        starts += [longest - steps] * len(rows)
    series = torch.repeat_interleave(torch.tensor(counts))
    return Rows(torch.cat(values), torch.cat(futures), series, torch.tensor(targets), torch.tensor(starts))


def like(series: Any, found: Sequence[Series], predictions: Tensor) -> Any:
    """Predictions of all targets (R, ...) as the series are: a tensor or an array, with (B, V) in front, without the V
    or without both where the series had none; or a list of such."""
    parts = predictions.split([len(one.target) for one in found])
    if isinstance(series, list | tuple):
        return [_kind(part[0] if x.ndim == 1 else part, x) for part, x in zip(parts, series, strict=True)]
    whole = torch.stack(parts)
    whole = whole[:, 0] if series.ndim < 3 else whole
    return _kind(whole[0] if series.ndim == 1 else whole, series)


def _kind(x: Tensor, like: Any) -> Any:
    return x.cpu().numpy() if isinstance(like, ndarray) else x.to(like.device)


def check_values(name: str, x: Tensor) -> int:
    """The number of rows of values (R, T).

    Raises:
        TypeError, ValueError: no floating tensor of such a shape, or infinity in it (on a CPU, where reading values
            stalls nothing).
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"{name}: expected shape (R, T) with T of at least 1, got {tuple(x.shape)}")
    infinite = x.isinf()
    if x.device.type == "cpu" and values_known(infinite) and bool(infinite.any()):
        row, step = infinite.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected finite values, or NaN where one is missing, got infinity in row {row}, step {step}"
        )
    return x.shape[0]
