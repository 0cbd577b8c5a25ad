"""Linear layers whose weights are integers of few bits: y = (scale * q) x + b, q packed."""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    bits: int
