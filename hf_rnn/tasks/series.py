"""Synthetic series to train forecasters on: seasons, trends, chaos, autoregression, steps and counts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from hf_rnn.tasks.synthetic import random_of_row

PERIODS = (4, 7, 12, 24, 48, 52)  # quarters, weekdays, months, hours, half hours, weeks
ORDER = 4  # of autoregression, at most


@dataclass(frozen=True)
class SyntheticSeries:
    """A map-style data set of series of numbers; series i is a function of (seed, i), its kind number i modulo the
    number of kinds.

    A row is `kind`, a name of `SERIES_KINDS`, and `values` (length,), float64.

    Args:
        length: T, steps of each series.
        size: number of series; they cost nothing until they are asked for.
        seed: other series for another seed.

    Raises:
        ValueError: a number out of its range.
    """

    length: int = 512
    size: int = 2**20
    seed: int = 0

    def __post_init__(self):
        for name, least in dict(length=2, size=1, seed=0).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, str | np.ndarray]:
        random = random_of_row(index, self.size, self.seed)
        kind = list(SERIES_KINDS)[index % self.size % len(SERIES_KINDS)]
        return {"kind": kind, "values": SERIES_KINDS[kind](random, self.length)}


def _noise(random: Generator, length: int, most: float = 0.3) -> np.ndarray:
    """White, of a deviation up to `most`."""
    return random.uniform(0, most) * random.standard_normal(length)


def _season(random: Generator, length: int) -> np.ndarray:
    """Up to four harmonics of one period, of deviation 1."""
    period = random.choice(PERIODS) if random.random() < 0.5 else random.uniform(3, 100)
    harmonics = np.arange(1, 1 + random.integers(1, 5))[:, None]
    weights, phases = (
        random.standard_normal(harmonics.shape) / harmonics,
        random.uniform(0, 2 * math.pi, harmonics.shape),
    )
    waves = weights * np.sin(2 * math.pi * harmonics * np.arange(length) / period + phases)
    return waves.sum(0) / math.sqrt((weights**2).sum() / 2)


def _line(random: Generator, length: int) -> np.ndarray:
    """From 0 to about 3 or -3, straight, bent, or ever slower."""
    t = np.linspace(0, 1, length)
    bend = random.choice(["straight", "power", "damped"])
    shape = {"straight": t, "power": t ** random.uniform(0.5, 3), "damped": 1 - np.exp(-random.uniform(1, 6) * t)}[bend]
    return 3 * random.standard_normal() * shape


def seasonal(random: Generator, length: int) -> np.ndarray:
    """One season or two, and noise."""
    second = random.integers(2) * random.uniform(0, 1) * _season(random, length)
    return _season(random, length) + second + _noise(random, length)


def trending(random: Generator, length: int) -> np.ndarray:
    """A trend and noise."""
    return _line(random, length) + _noise(random, length)


def seasonal_trending(random: Generator, length: int) -> np.ndarray:
    """A season on a trend, added, or growing with it as air passengers' does."""
    line, season = _line(random, length), _season(random, length)
    if random.random() < 0.5:
        return line + random.uniform(0.2, 1) * season + _noise(random, length)
    return np.exp(line + random.uniform(0.05, 0.3) * season + _noise(random, length, 0.1))


def logistic(random: Generator, length: int) -> np.ndarray:
    """x' = r x (1 - x), the logistic map (May, 1976), where it is chaotic for most r."""
    r, x, values = random.uniform(3.6, 4.0), random.uniform(0.1, 0.9), np.empty(length)
    for t in range(length):
        x = r * x * (1 - x)
        values[t] = x
    return values


def lorenz(random: Generator, length: int) -> np.ndarray:
    """A coordinate of Lorenz' system (1963) with sigma 10, rho 28, beta 8 / 3, by Runge and Kutta's fourth order, a
    step of a series being 0.02 to 0.1 units of time. Behind 10 units, when it is on its attractor."""
    stride, inner = random.uniform(0.02, 0.1), 5
    step, state = stride / inner, random.standard_normal(3)
    which, values = random.integers(3), np.empty(length)

    def slope(p: np.ndarray) -> np.ndarray:
        x, y, z = p
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    before = math.ceil(10 / stride)
    for t in range(before + length):
        for _ in range(inner):
            a = slope(state)
            b = slope(state + step / 2 * a)
            c = slope(state + step / 2 * b)
            d = slope(state + step * c)
            state = state + step / 6 * (a + 2 * b + 2 * c + d)
        if t >= before:
            values[t - before] = state[which]
    return values


def mackey_glass(random: Generator, length: int) -> np.ndarray:
    """dx/dt = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x (Mackey and Glass, 1977), tau from 17 to 30, by Euler's
    steps of 0.5, of which a step of a series has 1 to 8. Behind 300 units of time."""
    delay, stride = int(random.integers(34, 61)), int(random.integers(1, 9))
    x = [random.uniform(0.8, 1.4)] * (delay + 1)
    for _ in range(600 + stride * length):
        late = x[-1 - delay]
        x.append(x[-1] + 0.5 * (0.2 * late / (1 + late**10) - 0.1 * x[-1]))
    return np.array(x[-stride * length :: stride])


def autoregressive(random: Generator, length: int) -> np.ndarray:
    """Noise through a stable filter of up to four terms, made of partial autocorrelations within (-1, 1) (Levinson and
    Durbin; Barndorff-Nielsen and Schou, 1973)."""
    coefficients = np.zeros(0)
    for partial in random.uniform(-0.95, 0.95, random.integers(1, ORDER + 1)):
        coefficients = np.append(coefficients - partial * coefficients[::-1], partial)
    values = random.standard_normal(100 + length)
    for t in range(len(coefficients), len(values)):
        values[t] += coefficients @ values[t - len(coefficients) : t][::-1]
    return values[100:]


def random_walk(random: Generator, length: int) -> np.ndarray:
    """Sums of normal steps, with a drift in half of them."""
    drift = random.integers(2) * random.uniform(-0.3, 0.3)
    return np.cumsum(drift + random.standard_normal(length))


def steps(random: Generator, length: int) -> np.ndarray:
    """Levels that hold for a while, 10 to 100 steps in the mean, and noise."""
    jumps = random.random(length) < 1 / random.uniform(10, 100)
    since = np.maximum.accumulate(np.where(jumps, np.arange(length), 0))
    return random.standard_normal(length)[since] + _noise(random, length, 0.2)


def counts(random: Generator, length: int) -> np.ndarray:
    """Whole numbers, many of them 0, whose mean has a season: the demand for a thing."""
    mean = random.uniform(0.2, 5) * np.exp(random.uniform(0, 1) * _season(random, length))
    return random.poisson(mean).astype(float)


SERIES_KINDS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    function.__name__: function
    for function in (
        seasonal, trending, seasonal_trending, logistic, lorenz, mackey_glass, autoregressive, random_walk, steps,
        counts,
    )
}  # fmt: skip
