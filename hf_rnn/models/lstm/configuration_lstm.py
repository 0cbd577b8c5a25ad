from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_block import MultiHeadConfig


@strict
class LSTMConfig(MultiHeadConfig):
    """Configuration of the LSTM ("Long Short-Term Memory" with forget gates).

    Args:
        forget_bias: initial bias of the forget gate: larger keeps the state longer. 1 as Jozefowicz et al. (2015).
        projection_size: h has so many channels, a linear layer of the LSTM's output, which the gates see and the layer
            gives (arXiv 1402.1128, `proj_size` of `torch.nn.LSTM`); None: no such layer. One head, from zeros, and
            torch's own LSTM at work.
        others: see `MultiHeadConfig`.
    """

    model_type = "hf_rnn_lstm"

    forget_bias: int | float = 1.0
    projection_size: int | None = None

    @property
    def output_size(self) -> int:
        return self.projection_size or self.inner_size

    def validate_architecture(self):
        super().validate_architecture()
        if self.projection_size is None:
            return
        if not 0 < self.projection_size < self.inner_size:
            raise ValueError(
                f"projection_size: expected at least 1 and less than the {self.inner_size} channels, got "
                f"{self.projection_size}"
            )
        for name, expected in (("block_layout", "paper"), ("num_heads", 1), ("learned_initial_state", False)):
            if getattr(self, name) != expected:
                raise ValueError(f"{name}: expected {expected!r} with projection_size, got {getattr(self, name)!r}")
