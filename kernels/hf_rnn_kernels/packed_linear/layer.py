"""nn.Linear with packed weights."""

import torch
from torch import Tensor, nn

from hf_rnn_kernels.packed_linear.op import packed_linear
from hf_rnn_kernels.packed_linear.packing import choose_group, pack, unpack


class _Packed:
    """`packed` and `scale` of a layer. Scales lie as their bits in an int32 buffer: what makes a model's numbers
    bfloat16, `model.to` or a loader, leaves them as they are."""

    def _make(self, rows: int, inputs: int, bits: int, group_size: int | None) -> None:
        self.bits, self.group_size = bits, choose_group(inputs, bits, group_size)
        self._sizes = dict(packed=(rows, inputs * bits // 8), scale_bits=(rows, inputs // self.group_size))
        for name, dtype in (("packed", torch.uint8), ("scale_bits", torch.int32)):
            self.register_buffer(name, torch.zeros(self._sizes[name], dtype=dtype))  # type: ignore[attr-defined]

    def _fill(self, weight: Tensor) -> None:
        self.packed, scale = pack(weight, self.bits, self.group_size)
        self.scale_bits = scale.view(torch.int32)

    def check(self, name: str) -> None:
        """Raise ValueError unless what was loaded has its shape and finite scales; `name`: the layer's."""
        for part, size in self._sizes.items():
            if (found := tuple(getattr(self, part).shape)) != size:
                raise ValueError(f"{name}.{part}: expected shape {size}, got {found}; get the file again")
        if not self.scale.isfinite().all():
            raise ValueError(f"{name}.scale: expected finite numbers, got NaN or infinity; get the file again")

    @property
    def scale(self) -> Tensor:
        """(rows, I / group_size) float32."""
        return self.scale_bits.view(torch.float32)


class PackedMatrix(_Packed, nn.Module):
    """A parameter (G, O, I) as read-only integers: `packed` (G * O, I * bits / 8), `scale` (G * O, I / group_size)."""

    def __init__(self, shape: tuple[int, int, int], bits: int, group_size: int | None = None):
        super().__init__()
        groups, outputs, inputs = self.shape = tuple(shape)
        self._make(groups * outputs, inputs, bits, group_size)

    @classmethod
    def of(cls, weight: Tensor, bits: int, group_size: int | None = None) -> "PackedMatrix":
        with torch.device("meta"):
            matrix = cls(weight.shape, bits, group_size)  # type: ignore[arg-type]
        matrix._fill(weight.flatten(0, 1))
        return matrix

    def dequantize(self) -> Tensor:
        return unpack(self.packed, self.scale, self.bits).view(self.shape)  # type: ignore[arg-type]


def plain(weight: Tensor | PackedMatrix) -> Tensor:
    """A parameter's numbers, packed or not."""
    return weight.dequantize() if isinstance(weight, PackedMatrix) else weight


class PackedLinear(_Packed, nn.Linear):
    """A linear layer whose matrix is read-only integers: `packed` (O, I * bits / 8) and `scale` (O, I / group_size).

    An nn.Linear for those who adapt such: its `weight` has the shape, dtype and device of what there is not, and NaN
    for numbers, so that nothing can be merged into it. `dequantize` gives the numbers.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, group_size: int | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._make(out_features, in_features, bits, group_size)
        zeros = nn.Parameter(torch.zeros(out_features), requires_grad=False)
        self.bias = zeros if bias else None  # type: ignore[assignment]

    @classmethod
    def of(cls, linear: nn.Linear, bits: int, group_size: int | None = None) -> "PackedLinear":
        """Its weights rounded to integers, its bias as it is."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, bits, group_size)
        layer._fill(linear.weight)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        weight = self.scale.new_full((), float("nan")).expand(self.out_features, self.in_features)  # type: ignore
        weight._is_hf_initialized = True  # type: ignore  # transformers' initialisation passes it by
        return weight

    def dequantize(self) -> nn.Linear:
        """The same layer with plain weights."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight = nn.Parameter(unpack(self.packed, self.scale, self.bits))  # type: ignore[arg-type]
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear.train(self.training)

    def reset_parameters(self) -> None:
        """Weights come packed."""

    def forward(self, x: Tensor) -> Tensor:
        y = packed_linear(x, self.packed, self.scale, self.bits)  # type: ignore[arg-type]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, bits={self.bits}, group_size={self.group_size}"
