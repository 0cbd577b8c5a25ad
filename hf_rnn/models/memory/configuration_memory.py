from huggingface_hub.dataclasses import strict

from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig


@strict
class MemoryRNNConfig(RecurrentConfig):
    """Configuration of the memory RNN of "Pretraining Recurrent Networks without Recurrence" (2026).

    Its state is a memory of K tokens of hidden_size channels, each on the sphere of radius sqrt(hidden_size). Nothing
    but the memory reaches the output. The paper's network has one memory, K = 16, and a transformer of depth 8.

    Args:
        num_hidden_layers: memories on top of each other, each reading the readout of the one below; the paper's is 1.
        num_memory_tokens: K.
        updater: what makes the next memory of [memory; token]: "transformer" (bidirectional), "mlp" or "gru".
        updater_layers: depth of the updater; a "gru" is one cell and takes no depth.
        num_heads: attention heads of the transformer.
        feed_forward_factor: the feed-forwards have int(hidden_size * feed_forward_factor) channels, those of an "mlp"
            of the whole memory int(num_memory_tokens * hidden_size * feed_forward_factor / 2).
        initializer_range: standard deviation of the initial embeddings and of the head; the updater's weights start
            with 1 / sqrt(inputs).
        others: see `RecurrentConfig`.
    """

    model_type = "hf_rnn_memory"

    hidden_size: int = 128
    num_hidden_layers: int = 1
    num_memory_tokens: int = 8
    updater: str = "transformer"
    updater_layers: int = 2
    num_heads: int = 4
    feed_forward_factor: int | float = 4.0
    initializer_range: int | float = 0.1

    @property
    def feed_forward_size(self) -> int:
        """Channels of a feed-forward of one token."""
        return int(self.hidden_size * self.feed_forward_factor)

    def tensor_parallel_plan(self) -> dict[str, str]:
        """The readout's matrices over processes. The updater is on each: its products wait for one another at every
        token, and would wait for the network as well."""
        plan = {"layers.*.mixer.out_proj": "rowwise_split_input"}
        return plan | {"layers.*.mixer.ff.up_proj": "colwise", "layers.*.mixer.ff.down_proj": "rowwise"}

    @property
    def memory_size(self) -> int:
        """Channels of the whole memory."""
        return self.num_memory_tokens * self.hidden_size

    def validate_architecture(self):
        super().validate_architecture()
        if self.updater not in ("transformer", "mlp", "gru"):
            raise ValueError(f"updater: expected 'transformer', 'mlp' or 'gru', got {self.updater!r}")
        for name in ("num_memory_tokens", "updater_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.updater == "transformer" and self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size, {self.hidden_size}, got {self.num_heads}")
        if not 0 < self.feed_forward_factor < float("inf") or self.feed_forward_size < 1:
            raise ValueError(
                f"feed_forward_factor: expected a finite number that leaves channels, got {self.feed_forward_factor}"
            )
        self._check_width("feed_forward_factor", self.feed_forward_size)
        self._check_width("num_memory_tokens", self.memory_size)
        if self.updater_layers > 1000:
            raise ValueError(f"updater_layers: expected at most 1,000, got {self.updater_layers}")
