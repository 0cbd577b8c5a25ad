"""Models that are torch.nn's when their blocks are bare: weights both ways."""

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
        """The recurrences, layer by layer."""
        return [layer.mixer for layer in self.layers]  # type: ignore[misc]

    @classmethod
    def from_torch(cls, rnn: nn.RNNBase, embedding: nn.Embedding | None = None, **config: Any):
        """The same network as an instance of this class: given `inputs_embeds`, equal outputs and gradients.

        Args:
            rnn: a `torch.nn.LSTM` (`GRU`), any number of layers, its input as wide as its states. Models of this
                package take the batch first, whatever its `batch_first`.
            embedding: the network's embedding, if it has one; else a new one, (config's vocab_size, hidden_size).
            config: settings that `rnn` does not determine, such as vocab_size, or a pad_token_id for `embedding`, which
                has no special tokens but its padding_idx by default.

        Raises:
            TypeError: not the torch class of this model.
            ValueError: a network this class cannot be: bidirectional, with projections, or with an input of another
                width; a setting that `rnn` determines.
        """
        if not isinstance(rnn, cls.torch_class):
            raise TypeError(f"rnn: expected a torch.nn.{cls.torch_class.__name__}, got {type(rnn).__name__}")
        if rnn.bidirectional:
            raise ValueError("rnn: bidirectional networks see the future and cannot generate; expected one direction")
        if rnn.proj_size:
            raise ValueError(f"rnn: expected proj_size=0, got {rnn.proj_size}")
        if rnn.input_size != rnn.hidden_size:
            raise ValueError(
                f"rnn: expected input_size equal to hidden_size, {rnn.hidden_size}, got {rnn.input_size}; project the "
                "embeddings to it first"
            )
        if embedding is not None:
            if embedding.embedding_dim != rnn.input_size:
                raise ValueError(f"embedding: expected {rnn.input_size} wide, got {embedding.embedding_dim}")
            tokens = dict(pad_token_id=embedding.padding_idx, bos_token_id=None, eos_token_id=None)
            config = tokens | config | {"vocab_size": embedding.num_embeddings}
        settings = dict(
            hidden_size=rnn.hidden_size,
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
            expansion_factor=1,
        )
        if taken := [name for name in config if name in settings]:
            raise ValueError(f"{taken[0]}: not a choice here, rnn determines it")
        weight = rnn.weight_ih_l0
        model = cls(cls.config_class(**settings, **config)).to(weight.device, weight.dtype).train(rnn.training)  # type: ignore[arg-type]
        with torch.no_grad():
            for layer, mixer in enumerate(model.mixers()):
                for parameter, name in _pairs(mixer):
                    parameter.copy_(getattr(rnn, f"{name}_l{layer}").view_as(parameter))
            if embedding is not None:
                model.embed_tokens.weight.copy_(embedding.weight)
        return model

    def to_torch(self) -> nn.RNNBase:
        """The layers as one batch_first `torch.nn.LSTM` (`GRU`); several heads become a dense matrix with zeros.

        Raises:
            ValueError: blocks that are more than the recurrence, or a learned initial state that is not zero.
        """
        c = self.config
        if c.residual or c.output_projection or c.inner_size != c.hidden_size:
            raise ValueError(
                "to_torch: torch.nn stacks bare recurrences; this needs a model with residual=False, "
                "output_projection=False and expansion_factor=1"
            )
        sizes = (c.hidden_size, c.hidden_size, c.num_hidden_layers)
        rnn = self.torch_class(*sizes, bias=c.use_bias, batch_first=True, dropout=c.hidden_dropout)
        rnn = rnn.to(self.device, self.dtype).train(self.training)
        with torch.no_grad():
            for layer, mixer in enumerate(self.mixers()):
                if type(mixer.in_proj) is not nn.Linear:
                    raise ValueError("to_torch: in_proj is no plain linear layer; merge adapters into it first")
                if mixer.initial_state is not None and mixer.initial_state.any():
                    raise ValueError("to_torch: torch.nn has no learned initial state; pass it as hx, and zero it here")
                for parameter, name in _pairs(mixer):
                    getattr(rnn, f"{name}_l{layer}").copy_(self._gate_major(parameter, mixer.num_projections))
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
    return pairs
