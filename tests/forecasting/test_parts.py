"""Scaling, trends, differences and quantiles, by their equations."""

import numpy as np
import torch

from hf_rnn.forecasting.quantiles import at_quantiles, pinball_loss
from hf_rnn.forecasting.scaling import standardize
from hf_rnn.forecasting.trend import DIFFERENCE_BAND, differences, has_trend, last_values, levels

NAN = float("nan")


def walk(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(-1)


def test_standardize():
    x = walk(5, 40)
    x[1, 3:8], x[2], x[3], x[4] = NAN, NAN, (x[3] > 0).double(), 3.0
    scaling = standardize(x)
    z = scaling.apply(x)
    for row in (0, 1):
        values = x[row].numpy()
        expected = np.arcsinh((values - np.nanmean(values)) / np.nanstd(values))
        np.testing.assert_allclose(z[row], expected, rtol=1e-12, equal_nan=True)
    assert z[2].isnan().all() and torch.equal(z[3], x[3]) and not z[4].any()
    torch.testing.assert_close(scaling.undo(z[..., None])[..., 0], x, rtol=1e-12, atol=1e-12, equal_nan=True)
    plain = standardize(x, use_arcsinh=False, binary_aware=False).apply(x)
    torch.testing.assert_close(plain[[0, 3]].std(1, correction=0), torch.ones(2, dtype=x.dtype))


def test_trends():
    """As a fit by least squares says, of what is there."""
    slope = torch.linspace(-1, 1, 60, dtype=torch.float64)
    x = walk(60, 30) + slope[:, None] * torch.arange(30)
    x[:, 3:6] = NAN
    steps = np.delete(np.arange(30), [3, 4, 5])
    expected = []
    for row in x.numpy()[:, steps]:
        left = row - np.polyval(np.polyfit(steps, row, 1), steps)
        expected.append(1 - left.var() / row.var() >= 0.87)
    found = has_trend(x)
    assert found.tolist() == expected and 5 < sum(expected) < 55
    few = torch.full((3, 10), NAN)
    few[0, 2:5], few[1] = torch.arange(3.0), 7.0  # three values, a constant, none
    assert not has_trend(few).any()


def test_differences_add_up():
    x = walk(3, 20)
    x[1, -3:] = NAN
    d = differences(x, torch.tensor([0, 0, 5]))
    assert not d[0, 0] and not d[2, 5] and torch.equal(d[0, 1:], x[0, 1:] - x[0, :-1])
    assert last_values(x).tolist() == [x[0, -1], x[1, -4], x[2, -1]] and last_values(x * NAN).tolist() == [0.0] * 3
    steps = walk(2, 6, 5, seed=3).sort(-1).values
    found, last = levels(steps, x[:2, 0], DIFFERENCE_BAND), x[:2, 0]
    for row in range(2):
        for t in range(6):
            median = last[row] + steps[row, : t + 1, 2].sum()
            for q in range(5):
                distance = steps[row, :, q] - steps[row, :, 2]
                band = 1.68**0.5 * (t + 1) ** 0.01 * distance[: t + 1].square().sum().sqrt() * distance.sum().sign()
                torch.testing.assert_close(found[row, t, q], median + band)


def test_quantiles():
    predictions, values = walk(2, 3, 3).sort(-1).values, walk(2, 3, seed=2)
    levels, mask = [0.1, 0.5, 0.8], torch.tensor([[True, True, False], [False, True, True]])
    terms = []
    for (row, step), there in np.ndenumerate(mask.numpy()):
        for number, q in enumerate(levels):
            error = values[row, step] - predictions[row, step, number]
            terms += [error * q if error > 0 else error * (q - 1)] if there else []
    values[0, 2] = NAN
    torch.testing.assert_close(pinball_loss(predictions, values, levels, mask), torch.stack(terms).mean())
    assert pinball_loss(predictions, values, levels, mask & False) == 0
    wanted = [0.1, 0.33, 0.5, 0.77, 0.8]
    expected = np.apply_along_axis(lambda p: np.interp(wanted, levels, p), -1, predictions.numpy())
    np.testing.assert_allclose(at_quantiles(predictions, levels, wanted), expected)
