"""What is asked of every token."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig
from hf_rnn.skeleton.heads.labels import check_token_labels, count_labels
from hf_rnn.skeleton.inputs import check_reads_tokens, state_of
from hf_rnn.skeleton.modeling_recurrent import RecurrentModel
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel
from hf_rnn.skeleton.versions import STATE, CausalLMOutput


class RecurrentTokenHead(RecurrentPreTrainedModel):
    """The backbone, and logits of each token.

    Attributes:
        model_class: the architecture's backbone.
    """

    model_class: type[RecurrentModel]

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.model = self.model_class(config)

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """(B, T, hidden_size) to (B, T, C)."""

    @abstractmethod
    def loss_of(self, logits: Tensor, labels: Tensor, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
        """Of the logits; `inputs` are forward's other arguments, `kwargs` the loss function's."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: RecurrentCache | None = None,
        input_features: torch.FloatTensor | None = None,
        observed_mask: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutput:
        """Logits of each token, and the loss where there are labels.

        Args:
            labels: as the class says.
            kwargs: `num_items_in_batch`, by which the summed loss is divided; what `RecurrentModel.forward` takes.
            others: see `RecurrentModel.forward`.

        Returns:
            `loss`, `logits` (B, T, C), `cache`, which is `past_key_values` as well, `hidden_states` if asked for.

        Raises:
            TypeError, ValueError, IndexError: labels of another type, shape or value; see `RecurrentModel.forward`.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        inputs = dict(kwargs, attention_mask=attention_mask, position_ids=position_ids, input_features=input_features)
        outputs = self.model(
            input_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=state_of(cache, past_key_values),
            observed_mask=observed_mask,
            **inputs | {"return_dict": True},
        )
        logits = self.logits(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_of(logits, labels, inputs, num_items_in_batch=num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{STATE: outputs.cache})


class RecurrentForTokenClassification(RecurrentTokenHead):
    """A label for each token: (B, T, num_labels). Labels are (B, T), -100 is ignored."""

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.num_labels = count_labels(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def logits(self, x: Tensor) -> Tensor:
        return self.score(x)

    def loss_of(self, logits: Tensor, labels: Tensor, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
        check_token_labels(labels, logits, "num_labels")
        return self.loss_function(logits=logits, labels=labels.long().contiguous(), config=self.config, **kwargs)


class RecurrentForMaskedLM(RecurrentTokenHead):
    """The token at each place: (B, T, vocab_size). Labels are (B, T), not shifted, -100 where nothing is asked.

    The head is `RecurrentForCausalLM`'s, and takes its checkpoints. A model that reads in one direction fills a mask by
    what stands on its left.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RecurrentConfig):
        check_reads_tokens(config)
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)

    def loss_of(self, logits: Tensor, labels: Tensor, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
        check_token_labels(labels, logits, "vocab_size")
        vocab_size = self.config.vocab_size
        return self.loss_function(logits=logits, labels=labels.long().contiguous(), vocab_size=vocab_size, **kwargs)
