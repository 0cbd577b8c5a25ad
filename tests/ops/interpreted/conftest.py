"""Values of the Triton kernels in Triton's interpreter: what `test_interpreter.py` runs."""

import pytest
import torch

from hf_rnn_kernels.recurrent_scan import triton as recurrent_scan


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory is NaN: what a kernel does not write shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.fixture
def small_streams(monkeypatch):
    """Small tiles where R is streamed."""
    monkeypatch.setattr(recurrent_scan, "UNITS", 16)
    monkeypatch.setattr(recurrent_scan, "DEPTH", 32)
