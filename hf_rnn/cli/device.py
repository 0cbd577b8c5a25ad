"""`--device`: where a command runs its model."""

import argparse

import torch


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu")


def find_device(name: str | None) -> torch.device:
    """The device of that name; None: the default.

    Raises:
        ValueError: this machine has none of that name.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.accelerator.current_accelerator(check_available=True)
    there = ["cpu"] if kind is None else ["cpu", *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in there and f"{name}:0" not in there:
        raise ValueError(f"device: expected one of {there}, got {name!r}")
    return torch.device(name)
