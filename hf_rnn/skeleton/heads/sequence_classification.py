"""A label, several or numbers for each sequence."""

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig
from hf_rnn.skeleton.heads.labels import check_sequence_labels, count_labels
from hf_rnn.skeleton.heads.sequences import pool, real_tokens, refuse_packing
from hf_rnn.skeleton.inputs import state_of
from hf_rnn.skeleton.modeling_recurrent import RecurrentModel
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel
from hf_rnn.skeleton.versions import STATE, SequenceClassifierOutput


class RecurrentForSequenceClassification(RecurrentPreTrainedModel):
    """Classifier: a linear layer on one vector of each sequence, `config.classifier_pooling`.

    Attributes:
        model_class: the architecture's backbone.
    """

    model_class: type[RecurrentModel]
    accepts_loss_kwargs = False  # its loss is a mean, which Trainer divides by the accumulated batches

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.num_labels = count_labels(config)
        self.pooling = config.classifier_pooling or ("ends" if config.bidirectional else "last")
        self.model = self.model_class(config)
        width = config.hidden_size * (2 if self.pooling == "ends" else 1)
        self.score = nn.Linear(width, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: RecurrentCache | None = None,
        input_features: torch.FloatTensor | None = None,
        observed_mask: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels) of the tokens that `attention_mask` marks as real.

        Without an attention_mask, tokens equal to `config.pad_token_id` are padding. The loss follows
        `config.problem_type`, labels with it: "regression" takes floating (B,) or (B, num_labels),
        "single_label_classification" classes (B,), "multi_label_classification" floating (B, num_labels).

        Raises:
            ValueError: a row of padding only, or packed sequences (a classifier takes one sequence a row); a state to
                go on from where the pooling is of more than the last token.
            TypeError, ValueError, IndexError: labels of another type, shape or value; see `RecurrentModel.forward`.
        """
        refuse_packing(kwargs)
        state = state_of(cache, past_key_values)
        if state is not None and state.get_seq_length() and self.pooling != "last":
            raise ValueError(
                f"cache: classifier_pooling {self.pooling!r} is of a whole sequence, of which a state holds no tokens; "
                "expected none, or 'last'"
            )
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=state,
            input_features=input_features,
            observed_mask=observed_mask,
            return_dict=True,
            **kwargs,
        )
        x = outputs.last_hidden_state
        logits = self.score(pool(x, real_tokens(x, attention_mask, input_features, self.config), self.pooling))
        loss = None
        if labels is not None:
            check_sequence_labels(labels, logits, self.config)
            loss = self.loss_function(labels=labels, pooled_logits=logits, logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{STATE: outputs.cache}
        )
