"""Models that are torch.nn's when their blocks are bare: weights both ways."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_rnn.exchange.gate_order import to_gate_major
from hf_rnn.layers import MultiHeadMixer
from hf_rnn.skeleton.modeling_recurrent import RecurrentModel


class TorchExchangeModel(RecurrentModel):
    """A `RecurrentModel` of LSTM or GRU layers.

    Attributes:
        torch_class: `torch.nn.LSTM` or `torch.nn.GRU`.
    """

    config_class: Any
    torch_class: Any

    def mixers(self) -> list[MultiHeadMixer]:
        """The recurrences, layer by layer, of each layer both directions where there are two."""
        return [mixer for _, mixer in self._named_mixers()]

    def _named_mixers(self) -> list[tuple[str, MultiHeadMixer]]:
        """With the suffix that torch.nn gives the names of their weights."""
        if not self.config.bidirectional:
            return [(f"l{i}", layer.mixer) for i, layer in enumerate(self.layers)]  # type: ignore[misc]
        mixers: list[tuple[str, MultiHeadMixer]] = []
        for i, layer in enumerate(self.layers):
            both: Any = layer.mixer
            mixers += [(f"l{i}", both.forwards), (f"l{i}_reverse", both.backwards or both.forwards)]
        return mixers

    @classmethod
    def from_torch(cls, rnn: nn.RNNBase, embedding: nn.Embedding | None = None, **config: Any):
        """The same network as an instance of this class: given `inputs_embeds`, equal outputs and gradients.

        Args:
            rnn: a `torch.nn.LSTM` (`GRU`), any number of layers, one direction or two, with or without `proj_size`.
                Models of this package take the batch first, whatever its `batch_first`.
            embedding: the network's embedding, if it has one; else a new one, (config's vocab_size, rnn.input_size).
            config: settings that `rnn` does not determine, such as vocab_size, or a pad_token_id for `embedding`, which
                has no special tokens but its padding_idx by default.

        Raises:
            TypeError: not the torch class of this model.
            ValueError: an embedding of another width than the network's input; a setting that `rnn` determines.
        """
        if not isinstance(rnn, cls.torch_class):
            raise TypeError(f"rnn: expected a torch.nn.{cls.torch_class.__name__}, got {type(rnn).__name__}")
        if embedding is not None:
            if config.get("num_input_features") is not None:
                raise ValueError("embedding: expected none with num_input_features, which are read instead of tokens")
            if embedding.embedding_dim != rnn.input_size:
                raise ValueError(f"embedding: expected {rnn.input_size} wide, got {embedding.embedding_dim}")
            tokens = dict(pad_token_id=embedding.padding_idx, bos_token_id=None, eos_token_id=None)
            config = tokens | config | {"vocab_size": embedding.num_embeddings}
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        settings = dict(
            hidden_size=width,
            embedding_size=rnn.input_size,
            bidirectional=rnn.bidirectional,
            share_directions=False,
            num_hidden_layers=rnn.num_layers,
            use_bias=rnn.bias,
            hidden_dropout=rnn.dropout,
            learned_initial_state=False,
            block_layout="paper",
            residual=False,
            conv_kernel=0,
            feed_forward_factor=0,
            output_projection=False,
            num_heads=1,
            expansion_factor=_factor(rnn.hidden_size, width),
        )
        if isinstance(rnn, nn.LSTM):
            settings["projection_size"] = rnn.proj_size or None
        if taken := [name for name in config if name in settings]:
            raise ValueError(f"{taken[0]}: not a choice here, rnn determines it")
        weight = rnn.weight_ih_l0
        model = cls(cls.config_class(**settings, **config)).to(weight.device, weight.dtype).train(rnn.training)  # type: ignore[arg-type]
        with torch.no_grad():
            for suffix, mixer in model._named_mixers():
                for parameter, name in _pairs(mixer):
                    parameter.copy_(getattr(rnn, f"{name}_{suffix}").view_as(parameter))
            if embedding is not None:
                model.embed_tokens.weight.copy_(embedding.weight)
        return model

    def to_torch(self) -> nn.RNNBase:
        """The layers as one batch_first `torch.nn.LSTM` (`GRU`); several heads become a dense matrix with zeros.

        Raises:
            ValueError: blocks that are more than the recurrence, or a learned initial state that is not zero.
        """
        c = self.config
        if c.residual or c.output_projection:
            raise ValueError(
                "to_torch: torch.nn stacks bare recurrences; this needs a model with residual=False and "
                "output_projection=False"
            )
        projected = {} if c.output_size == c.inner_size else {"proj_size": c.output_size}
        rnn = self.torch_class(
            c.input_size,
            c.inner_size,
            c.num_hidden_layers,
            bias=c.use_bias,
            batch_first=True,
            dropout=c.hidden_dropout,
            bidirectional=c.bidirectional,
            **projected,
        )
        rnn = rnn.to(self.device, self.dtype).train(self.training)
        with torch.no_grad():
            for suffix, mixer in self._named_mixers():
                if type(mixer.in_proj) is not nn.Linear:
                    raise ValueError("to_torch: in_proj is no plain linear layer; merge adapters into it first")
                if mixer.initial_state is not None and mixer.initial_state.any():
                    raise ValueError("to_torch: torch.nn has no learned initial state; pass it as hx, and zero it here")
                for parameter, name in _pairs(mixer):
                    gates = 1 if name == "weight_hr" else mixer.num_projections
                    getattr(rnn, f"{name}_{suffix}").copy_(self._gate_major(parameter, gates))
        return rnn

    def _gate_major(self, parameter: Tensor, gates: int) -> Tensor:
        """A parameter in torch's order; R (H, gates * P, P), the only one of three dimensions, made dense."""
        if parameter.dim() < 3:
            return to_gate_major(parameter, gates, self.config.num_heads)
        blocks = parameter.unflatten(1, (gates, -1))
        return torch.cat([torch.block_diag(*blocks[:, gate]) for gate in range(gates)])


def _pairs(mixer: MultiHeadMixer) -> list[tuple[Tensor, str]]:
    """Parameters of a mixer and what torch.nn calls them."""
    pairs: list[tuple[Tensor, str]] = [(mixer.in_proj.weight, "weight_ih"), (mixer.recurrent_weight, "weight_hh")]
    if mixer.recurrent_bias is not None:
        pairs += [(mixer.in_proj.bias, "bias_ih"), (mixer.recurrent_bias, "bias_hh")]
    if mixer.projection is not None:
        pairs.append((mixer.projection.weight, "weight_hr"))
    return pairs


def _factor(channels: int, width: int) -> float:
    """`expansion_factor` for so many channels of the recurrence; its int() must not round to one less."""
    factor = channels / width
    return factor if int(width * factor) == channels else math.nextafter(factor, math.inf)
