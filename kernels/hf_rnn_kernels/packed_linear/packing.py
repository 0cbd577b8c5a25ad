"""Matrices as integers of few bits, a scale for each group of neighbours in a row.

8 bits: a byte each, two's complement. 4 bits: two in a byte, plus 8; the first half of a group in the low halves of its
bytes, the second in the high ones, so that neighbours become neighbours in a register.
"""

import torch
from torch import Tensor

GROUP = {8: None, 4: 64}  # numbers that share a scale where nothing is said, at least; None: a whole row


def check_bits(bits: int, group_size: int | None = None) -> None:
    """Raise ValueError unless `pack` knows them."""
    if isinstance(bits, bool) or bits not in GROUP:
        raise ValueError(f"bits: expected 8 or 4, got {bits!r}")
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2):
        raise ValueError(f"group_size: expected an integer of at least 2, or None, got {group_size!r}")


def choose_group(inputs: int, bits: int, group_size: int | None, name: str = "weight") -> int:
    """`group_size`, or what is best for rows of so many numbers.

    Raises:
        ValueError: a group that does not divide a row, or, in 4 bits, is odd.
    """
    check_bits(bits, group_size)
    if group_size is None:
        if bits == 4 and inputs % 2:
            raise ValueError(f"{name}: 4 bits want an even number of inputs, got {inputs}")
        least = GROUP[bits] or inputs
        return next((n for n in range(least, inputs, 2) if inputs % n == 0), inputs)
    if inputs % group_size or (bits == 4 and group_size % 2):
        even = "an even divisor" if bits == 4 else "a divisor"
        raise ValueError(f"group_size: expected {even} of the {inputs} inputs of {name}, got {group_size}")
    return group_size


def _largest(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _exact_step(groups: Tensor, bits: int) -> Tensor:
    """The least power of two in which each group's largest number is an integer of so many bits."""
    most = groups.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2((most / _largest(bits)).log2().ceil())


def is_exact(weight: Tensor, bits: int, group_size: int | None = None) -> bool:
    """Whether `pack` keeps every number: multiples of a power of two, few enough, as coded checkpoints have."""
    groups = weight.detach().float().unflatten(-1, (-1, choose_group(weight.shape[-1], bits, group_size)))
    q = groups / _exact_step(groups, bits)
    return bool((q == q.round()).all()) and bool(weight.isfinite().all())


def pack(weight: Tensor, bits: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Round to integers from -127 to 127, or -7 to 7.

    A group that a power of two as its scale keeps exactly has that one; another the one of its largest number.

    Args:
        weight: (O, I), finite.
        group_size: numbers of a row that share a scale; None: all in 8 bits, in 4 the fewest from 64 on.

    Returns:
        packed (O, I * bits / 8) uint8, and scale (O, I / group_size) float32: weight = scale * q, about.
    """
    group = choose_group(weight.shape[-1], bits, group_size)
    groups = weight.detach().float().unflatten(-1, (-1, group))
    exact = _exact_step(groups, bits)
    scale = groups.abs().amax(-1, keepdim=True) / _largest(bits)
    multiples = (groups / exact == (groups / exact).round()).all(-1, keepdim=True)
    scale = torch.where(multiples, exact, scale)
    q = (groups / scale).round().clamp(-_largest(bits), _largest(bits)).to(torch.int16)
    if bits == 8:
        packed = (q & 0xFF).to(torch.uint8)
    else:
        low, high = (q + 8).chunk(2, -1)
        packed = (low | (high << 4)).to(torch.uint8)
    return packed.flatten(1).contiguous(), scale.squeeze(-1).contiguous()


def unpack(packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """(O, I) float32."""
    groups = packed.unflatten(-1, (scale.shape[-1], -1))
    halves = [] if bits == 8 else [groups & 15, groups >> 4]
    q = torch.cat(halves, -1).to(torch.int8) - 8 if halves else groups.view(torch.int8)
    return (q.float() * scale[..., None]).flatten(1)
