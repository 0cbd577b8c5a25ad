"""The answer to a question as a part of the text."""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput
from transformers.utils import can_return_tuple

from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig
from hf_rnn.skeleton.heads.labels import check_not_empty, check_positions
from hf_rnn.skeleton.heads.sequences import real_tokens, refuse_packing
from hf_rnn.skeleton.modeling_recurrent import RecurrentModel
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel


class RecurrentForQuestionAnswering(RecurrentPreTrainedModel):
    """Whether an answer starts, and whether it ends, at each token. The question stands in front of the text.

    Attributes:
        model_class: the architecture's backbone.
    """

    model_class: type[RecurrentModel]
    accepts_loss_kwargs = False  # its loss is a mean, which Trainer divides by the accumulated batches

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        observed_mask: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Logits of the first and of the last token of the answer, and the loss where it is known.

        Args:
            start_positions, end_positions: (B,) or (B, 1), places of real tokens among the T; others, such as -100, are
                ignored in the loss.
            kwargs: what `RecurrentModel.forward` takes.
            others: see `RecurrentModel.forward`.

        Returns:
            `loss`, `start_logits` and `end_logits` (B, T), `hidden_states` if asked for.

        Raises:
            ValueError: one of the positions without the other, or with packed sequences, which have an answer each.
            TypeError, ValueError: positions of another type or shape; see `RecurrentModel.forward`.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            input_features=input_features,
            observed_mask=observed_mask,
            **{"use_cache": False} | kwargs | {"return_dict": True},
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions, end_positions: expected both or none, got one")
        if start_positions is not None and end_positions is not None:
            refuse_packing(kwargs | {"position_ids": position_ids})
            for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
                check_positions(name, positions, start_logits.shape[0])
            check_not_empty("start_positions, end_positions", start_logits)
            real = real_tokens(outputs.last_hidden_state, attention_mask, input_features, self.config)
            least = torch.finfo(torch.float32).min  # -inf would be NaN in a row of padding only
            logits = [x.float().masked_fill(~real, least) for x in (start_logits, end_logits)]
            loss = self.loss_function(*logits, *(_places_among_real(x, real) for x in (start_positions, end_positions)))
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=outputs.hidden_states
        )


def _places_among_real(positions: Tensor, real: Tensor) -> Tensor:
    """Positions (B,) or (B, 1) as (B,); those of no `real` token (B, T) as T, which transformers' loss ignores."""
    time = real.shape[1]
    places = positions.long().view(-1, 1)
    known = (places >= 0) & (places < time)
    known = known & real.gather(1, places.clamp(0, time - 1))
    return torch.where(known, places, time).squeeze(1)
