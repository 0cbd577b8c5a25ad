"""Directions: known bits, the right moments, and the same wherever and however they are made."""

import math

import pytest
import torch
from torch import nn

from hf_rnn_trainers.zo import Directions
from hf_rnn_trainers.zo.directions import KINDS
from hf_rnn_trainers.zo.philox import normals, philox, signs, sparse_signs


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix, self.stack = nn.Parameter(torch.zeros(37, 29)), nn.Parameter(torch.zeros(2, 11, 7))
        self.vector, self.frozen = nn.Parameter(torch.zeros(2000)), nn.Parameter(torch.zeros(5), requires_grad=False)


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32, 10 rounds."""
    full, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    cases = [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((full,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for counter, seed, expected in cases:
        words = philox(tuple(torch.tensor(c) for c in counter), seed)
        assert " ".join(f"{word:08x}" for word in words.tolist()) == expected


def test_bits_to_elements():
    assert signs(torch.tensor([0b101]))[:4].tolist() == [1, -1, 1, -1]
    words = philox((torch.arange(50_000), *[torch.tensor(0)] * 3), 1).flatten()
    for x, variance in ((signs(words).double(), 1), (normals(words), 1), (sparse_signs(words, 0.25).double(), 0.25)):
        assert abs(x.mean()) < 5 * (variance / len(x)) ** 0.5
        assert abs(x.square().mean() / variance - 1) < 0.02
    x = normals(words)
    assert abs(x.pow(4).mean() - 3) < 0.1
    assert abs((x > 1).double().mean() - 0.158655) < 0.005


@pytest.mark.parametrize("kind", KINDS)
def test_uncorrelated(kind):
    """Over tensors, steps, directions, seeds, and parts of one tensor."""
    model = Small()
    model.other = nn.Parameter(torch.zeros(2000))
    every = Directions(model, kind)
    base = every.dense("vector", 3, 5).double()
    others = [
        every.dense("other", 3, 5),
        every.dense("vector", 4, 5),
        every.dense("vector", 3, 6),
        every.dense("vector", 5, 3),
        Directions(model, kind, seed=1).dense("vector", 3, 5),
        Directions(model, kind, seed=2**32).dense("vector", 3, 5),
        base.roll(1000),
        base.roll(1),
    ]
    for other in others:
        correlation = (base * other).mean() / (base.square().mean() * other.double().square().mean()).sqrt()
        assert abs(correlation) < 4 / math.sqrt(len(base))


@pytest.mark.parametrize("kind", KINDS)
def test_unit_covariance(kind):
    """E[delta delta^T] = I, over 4,000 directions."""
    model = nn.Module()
    model.matrix = nn.Parameter(torch.zeros(3, 4))
    every = Directions(model, kind, rank=2, density=0.3)
    x = torch.stack([every.dense("matrix", 0, j).flatten().double() for j in range(4000)])
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(12, dtype=x.dtype), rtol=0, atol=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_alone_and_together(kind):
    """Which other directions, tensors or frozen parameters there are changes nothing, nor does anyone's generator."""
    model = Small()
    before = torch.get_rng_state()
    every = Directions(model, kind, seed=7)
    expected = {name: every.dense(name, 2, 9) for name in ("matrix", "stack", "vector")}
    if kind == "low_rank":
        together, alone = every.factors(2, [4, 9, 1], torch.device("cpu")), every.factors(2, [9], torch.device("cpu"))
        for name, pieces in together.items():
            for a, b in zip(pieces, alone[name], strict=True):
                assert torch.equal(a[1], b[0])
    model.matrix.requires_grad_(False)
    fewer = Directions(model, kind, seed=7)
    assert set(fewer.parameters) == {"stack", "vector"}
    assert all(torch.equal(fewer.dense(name, 2, 9), expected[name]) for name in fewer.parameters)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_combine(kind, rank):
    every, c = Directions(Small(), kind, rank=rank), torch.tensor([0.5, 0.0, -2.0, 1.0])
    for p, parts in every.combine(4, c):
        name = next(name for name, (_, q) in every.parameters.items() if q is p)
        expected = sum(float(c[j]) * every.dense(name, 4, j).double() for j in range(4))
        actual = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert all((parts[0] == 0).all() for _, parts in every.combine(4, torch.zeros(4)))


def test_tied_parameters_are_one():
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
    model.head.weight = model.embedding.weight
    assert list(Directions(model).parameters) == ["embedding.weight"]
    assert Directions(model).size == 21
