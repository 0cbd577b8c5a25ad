from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from hf_rnn.models.tirex2.tirex_config import from_tirex_config, swiglu_size
from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig


@strict
class TiRex2Config(RecurrentConfig):
    """Configuration of TiRex-2 (arXiv 2607.01204), a forecaster of series with and without covariates.

    Sizes are the published model's. It reads no tokens: what `RecurrentConfig` says of them does nothing here.

    Args:
        hidden_size, num_hidden_layers: width of the residual stream, number of blocks.
        slstm_at: the blocks whose recurrence is an sLSTM, by index from 0; the others have an mLSTM. None: every second
            one, from the second on.
        num_heads: heads of mLSTMs.
        num_slstm_heads: heads of sLSTMs; None: num_heads.
        num_attention_heads: heads of the attention over variates.
        qk_norm: queries and keys of that attention are divided by their root mean square.
        intermediate_size: channels of the SwiGLU behind each recurrence; None: 2.6667 times hidden_size, rounded up to
            a multiple of 64.
        patch_size: P, so many steps in and out make one token.
        context_length: shorter series are padded to as many steps.
        prediction_length: the longest horizon, a multiple of patch_size.
        patch_intermediate_size: hidden channels of the layer that makes tokens of patches.
        hidden_act: activation of this layer, of the one that makes quantiles and of the feed-forward behind attention.
        output_norm_eps: epsilon of the norm in front of the head; None: no norm.
        initializer_range: standard deviation of initial linear weights; None: 1 / sqrt(inputs).
        others: see `RecurrentConfig`.
    """

    model_type = "hf_rnn_tirex2"

    hidden_size: int = 512
    num_hidden_layers: int = 12
    slstm_at: list[int] | None = None
    num_heads: int = 4
    num_slstm_heads: int | None = None
    num_attention_heads: int = 4
    qk_norm: bool = True
    intermediate_size: int | None = None
    patch_size: int = 32
    context_length: int = 2048
    prediction_length: int = 320
    patch_intermediate_size: int | None = 2048
    hidden_act: str = "silu"
    output_norm_eps: int | float | None = 1e-7
    differencing: bool = True
    initializer_range: int | float | None = None  # type: ignore[assignment]
    use_bias: bool = False
    use_cache: bool = False
    vocab_size: int = 1
    num_input_features: int | None = 1

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers', and reads the config of the `tirex-2` package, NX-AI/TiRex-2's, as one of ours."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "model_type" not in config and "stack_config" in config:
            config = {"model_type": cls.model_type, **from_tirex_config(config)}
        return config, kwargs

    @classmethod
    def auto_classes(cls) -> dict[str, str]:
        return {
            "AutoModel": "TiRex2Model",
            "AutoModelForSequenceClassification": "TiRex2ForSequenceClassification",
            "AutoModelForTimeSeriesPrediction": "TiRex2ForPrediction",
        }

    @property
    def slstm_blocks(self) -> list[int]:
        """Indices of the sLSTM blocks."""
        return list(range(1, self.num_hidden_layers, 2)) if self.slstm_at is None else self.slstm_at

    @property
    def slstm_heads(self) -> int:
        return self.num_slstm_heads or self.num_heads

    @property
    def sizes(self) -> dict[str, int]:
        """Channels of the mLSTM's queries and values and of the feed-forward."""
        width = self.hidden_size
        return {
            "qk_size": width // 2,
            "v_size": width,
            "intermediate_size": self.intermediate_size or swiglu_size(width),
        }

    # As the mLSTM of `hf_rnn.models.xlstm` is told
    @property
    def gate_soft_cap(self) -> float:
        return 15.0

    @property
    def epsilon(self) -> float:
        return self.norm_eps

    @property
    def initial_output_std(self) -> float:
        return 2 / self.num_hidden_layers / self.hidden_size**0.5

    def validate_architecture(self):
        super().validate_architecture()
        if self.patch_intermediate_size is None:
            raise ValueError("patch_intermediate_size: a TiRex-2 has such a layer; expected its channels, got None")
        for name, value in (("bidirectional", False), ("use_bias", False), ("num_input_features", 1)):
            if getattr(self, name) != value:
                raise ValueError(f"{name}: a TiRex-2 has none to choose; expected {value}, got {getattr(self, name)}")
        if wrong := [n for n in self.slstm_blocks if not 0 <= n < self.num_hidden_layers]:
            raise ValueError(f"slstm_at: expected indices from 0 to {self.num_hidden_layers - 1}, got {wrong[0]}")
        for name, heads in (
            ("num_heads", 2 * self.num_heads),  # queries have half the channels
            ("num_slstm_heads", self.slstm_heads),
            ("num_attention_heads", self.num_attention_heads),
        ):
            if heads < 1 or self.hidden_size % heads:
                raise ValueError(
                    f"{name}: expected heads among which hidden_size, {self.hidden_size}, can be divided"
                    f"{' twice' if name == 'num_heads' else ''}, got {getattr(self, name)}"
                )
        if self.prediction_length % self.patch_size:
            raise ValueError(
                f"prediction_length: expected a multiple of patch_size, {self.patch_size}, got {self.prediction_length}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act: expected an activation of transformers, got {self.hidden_act!r}")
        self._check_width("intermediate_size", self.sizes["intermediate_size"])
