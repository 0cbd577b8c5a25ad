from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict

from hf_rnn.models.xlstm.transformers_config import from_transformers_config
from hf_rnn.skeleton.configuration_hybrid import HybridConfig


@strict
class XLSTMConfig(HybridConfig):
    """Configuration of the xLSTM (arXiv 2405.04517), in one of its two published designs, or with gated sLSTM blocks.

    "7b", of xLSTM-7B (arXiv 2503.13427): mLSTM blocks without convolution, each followed by a SwiGLU, RMS norms, soft
    caps on gates and logits. "neurips", of the first paper: the mLSTM between an up- and a down-projection, the sLSTM
    followed by a gated GELU, both behind convolutions, layer norms. "gated" is "neurips" with the sLSTM as the mLSTM:
    wide, between two projections, its output gated, no feed-forward. Sizes that are None follow from hidden_size.

    Args:
        block_layout: "7b", "neurips" or "gated".
        slstm_at: the blocks that are sLSTM, by index from 0, or "all"; the other recurrent ones are mLSTM. Not with
            "7b". xLSTM[7:1] has one in eight.
        num_heads: heads of both cells.
        qk_size: queries' (and keys') channels, all heads together. "7b" only; None: half of hidden_size.
        v_size: values' channels, all heads together. "7b" only; None: hidden_size.
        inner_size: channels of the mLSTM, and of a gated sLSTM. Not with "7b"; None: 2 * hidden_size, rounded up to a
            multiple of 64.
        qkv_block_size: q, k and v are projected in blocks of so many channels. Not with "7b".
        conv_kernel: width of the causal convolutions; at least 2. Not with "7b".
        intermediate_size: channels of the feed-forward; None: 2.667 ("7b") or 1.3 times hidden_size, rounded up to a
            multiple of 64.
        gate_soft_cap: gates of the mLSTM are c tanh(x / c); None for none. "7b" only.
        logit_soft_cap: the same for logits. "7b" only.
        norm_eps: epsilon of the norms; None: 1e-6 ("7b") or 1e-5.
        initializer_range: standard deviation of the initial weights; None: sqrt(2 / (5 hidden_size)), the papers'.
            Projections back to the residual stream start with 2 / (num_hidden_layers sqrt(hidden_size)) in any case.
        others: see `HybridConfig`.
    """

    model_type = "hf_rnn_xlstm"

    block_layout: str = "7b"
    slstm_at: list[int] | str = field(default_factory=list)
    num_heads: int = 4
    qk_size: int | None = None
    v_size: int | None = None
    inner_size: int | None = None
    qkv_block_size: int = 4
    conv_kernel: int = 4
    intermediate_size: int | None = None
    gate_soft_cap: int | float | None = 15.0
    logit_soft_cap: int | float | None = 30.0
    norm_eps: int | float | None = None  # type: ignore[assignment]
    initializer_range: int | float | None = None  # type: ignore[assignment]
    use_bias: bool = False

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers', and reads the config of transformers' own `xlstm`, NX-AI/xLSTM-7b's, as one of ours."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == "xlstm":
            config = {"model_type": cls.model_type, **from_transformers_config(config)}
        return config, kwargs

    @property
    def is_7b(self) -> bool:
        return self.block_layout == "7b"

    @property
    def slstm_blocks(self) -> list[int]:
        """Indices of the sLSTM blocks."""
        if not isinstance(self.slstm_at, str):
            return list(self.slstm_at)
        return [index for index in range(self.num_hidden_layers) if not self.is_attention(index)]

    @property
    def sizes(self) -> dict[str, int]:
        """Channels of queries, values, the "neurips" mLSTM and the feed-forward: as told, or from hidden_size."""
        width, factor = self.hidden_size, 2.667 if self.is_7b else 1.3
        default = {
            "qk_size": width // 2,
            "v_size": width,
            "inner_size": _round_up(2 * width),
            "intermediate_size": _round_up(factor * width),
        }
        told = {name: getattr(self, name) for name in default}
        return default | {name: size for name, size in told.items() if size is not None}

    def tensor_parallel_plan(self) -> dict[str, str]:
        """As `RecurrentBlockConfig`'s, sLSTM cells whole on each process. A gated feed-forward's halves are cut alike,
        but gathered where it has biases, which transformers' "packed_colwise" (5.23) cuts as one."""
        into, back = ("in_proj", "out_proj") if self.is_7b else ("up_proj", "down_proj")
        plan = {f"layers.*.mixer.{into}": "colwise_gather_output", f"layers.*.mixer.{back}": "rowwise_split_input"}
        if len(self.slstm_blocks) == self.num_hidden_layers and self.block_layout == "neurips":
            plan = {}
        if self.block_layout == "gated" and self.slstm_blocks:
            plan |= {
                "layers.*.mixer.in_proj": "colwise_gather_output",
                "layers.*.mixer.out_proj": "rowwise_split_input",
            }
        if self.has_feed_forward:
            up, down = (
                ("colwise_gather_output", "rowwise_split_input") if self.use_bias else ("packed_colwise", "rowwise")
            )
            plan |= {"layers.*.ff.up_proj": up, "layers.*.ff.down_proj": down}
        return plan | self.attention_plan()

    @property
    def has_feed_forward(self) -> bool:
        """Whether any block has one: those of "7b", of sLSTM in "neurips", of attention."""
        return self.is_7b or self.has_attention or (self.block_layout == "neurips" and bool(self.slstm_blocks))

    @property
    def epsilon(self) -> float:
        """Of the norms."""
        return self.norm_eps or (1e-6 if self.is_7b else 1e-5)

    @property
    def initial_std(self) -> float:
        """Of embeddings and linear layers ("small init", Nguyen and Salazar, arXiv 1910.05895)."""
        return (2 / (5 * self.hidden_size)) ** 0.5 if self.initializer_range is None else self.initializer_range

    @property
    def initial_output_std(self) -> float:
        """Of projections back to the residual stream (Wang and Komatsuzaki, GPT-J)."""
        return 2 / self.num_hidden_layers / self.hidden_size**0.5

    def validate_architecture(self):
        if self.block_layout not in ("7b", "neurips", "gated"):
            raise ValueError(f"block_layout: expected '7b', 'neurips' or 'gated', got {self.block_layout!r}")
        super().validate_architecture()
        if isinstance(self.slstm_at, str) and self.slstm_at != "all":
            raise ValueError(f"slstm_at: expected indices of blocks or 'all', got {self.slstm_at!r}")
        if self.slstm_blocks and self.is_7b:
            raise ValueError("slstm_at: not with block_layout='7b', which has mLSTM blocks alone")
        if wrong := [n for n in self.slstm_blocks if not 0 <= n < self.num_hidden_layers]:
            raise ValueError(f"slstm_at: expected indices from 0 to {self.num_hidden_layers - 1}, got {wrong[0]}")
        if taken := [n for n in self.slstm_blocks if self.is_attention(n)]:
            raise ValueError(f"slstm_at: layer {taken[0]} is attention by layer_types")
        if self.num_heads < 1:
            raise ValueError(f"num_heads: expected at least 1, got {self.num_heads}")
        used, unused = (
            (["qk_size", "v_size"], ["inner_size"]) if self.is_7b else (["inner_size"], ["qk_size", "v_size"])
        )
        for name in unused:
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: the blocks of {self.block_layout!r} have no such size; leave it None")
        for name in used:
            size = self.sizes[name]
            if size < 1 or size % self.num_heads:
                raise ValueError(f"{name}: expected a multiple of the {self.num_heads} heads (num_heads), got {size}")
        if self.is_7b:
            for name in ("gate_soft_cap", "logit_soft_cap"):
                cap = getattr(self, name)
                if cap is not None and not 0 < cap < float("inf"):
                    raise ValueError(f"{name}: expected a finite number above 0, or None, got {cap}")
        else:
            if self.block_layout == "neurips" and self.slstm_blocks and self.hidden_size % self.num_heads:
                raise ValueError(f"num_heads: expected a divisor of hidden_size, {self.hidden_size}, for sLSTM blocks")
            if self.qkv_block_size < 1 or self.sizes["inner_size"] % self.qkv_block_size:
                raise ValueError(
                    f"qkv_block_size: expected a divisor of inner_size, {self.sizes['inner_size']}, "
                    f"got {self.qkv_block_size}"
                )
        if self.conv_kernel < 2:
            raise ValueError(f"conv_kernel: expected a width of at least 2, got {self.conv_kernel}")
        if self.sizes["intermediate_size"] < 1:
            raise ValueError(f"intermediate_size: expected at least 1, got {self.intermediate_size}")
        for name in ("intermediate_size", *used):
            self._check_width(name, self.sizes[name])
        self._check_width("conv_kernel", self.conv_kernel)


def _round_up(size: float) -> int:
    return -int(-size // 64) * 64
