"""A shorter sequence of labels than of inputs, of which nobody says where they stand: speech, handwriting, sensors."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig
from hf_rnn.skeleton.heads.labels import check_not_empty
from hf_rnn.skeleton.heads.sequences import real_tokens, refuse_packing
from hf_rnn.skeleton.heads.tokens import RecurrentTokenHead
from hf_rnn.skeleton.inputs import check_ids


class RecurrentForCTC(RecurrentTokenHead):
    """Connectionist temporal classification (Graves et al., 2006), in the conventions of transformers' Wav2Vec2ForCTC.

    Logits (B, T, vocab_size), of which `config.pad_token_id` is the blank. Labels are (B, L), any L, in [0, vocab_size)
    and -100 where there is none; the blank counts as such padding. `config.ctc_loss_reduction` and
    `config.ctc_zero_infinity` are those of `torch.nn.functional.ctc_loss`. Inputs that are tokens have the same
    vocabulary.
    """

    def __init__(self, config: RecurrentConfig):
        if config.pad_token_id is None or not 0 <= config.pad_token_id < config.vocab_size:
            raise ValueError(
                f"pad_token_id: expected the blank of CTC, a token id in [0, {config.vocab_size}), got "
                f"{config.pad_token_id}"
            )
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Sums of accumulated batches add up as they are; Trainer divides means by the number of batches."""
        return self.config.ctc_loss_reduction == "sum"

    def logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)

    def loss_of(self, logits: Tensor, labels: Tensor, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
        refuse_packing(inputs)
        blank = int(self.config.pad_token_id)  # type: ignore[arg-type]
        check_ids("labels", labels, self.config.vocab_size, ignore_index=-100)
        if labels.dim() != 2 or labels.shape[0] != logits.shape[0]:
            raise ValueError(f"labels: expected shape (B, L) with B = {logits.shape[0]}, got {tuple(labels.shape)}")
        check_not_empty("labels", logits)
        targets = (labels != -100) & (labels != blank)
        log_probabilities = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        mask = inputs["attention_mask"]
        real = real_tokens(logits, mask, inputs["input_features"], self.config)
        if mask is not None:
            log_probabilities = _in_front(log_probabilities, real)
        return nn.functional.ctc_loss(
            log_probabilities.transpose(0, 1),
            _in_front(labels.long(), targets),
            real.sum(1),
            targets.sum(1),
            blank=blank,
            reduction=self.config.ctc_loss_reduction,
            zero_infinity=self.config.ctc_zero_infinity,
        )


def _in_front(x: Tensor, real: Tensor) -> Tensor:
    """x (B, N, ...) with what is `real` (B, N) in front, in its order: lengths say what of a row counts."""
    order = real.long().argsort(dim=1, descending=True, stable=True)
    return x.take_along_dim(order.view(*order.shape, *[1] * (x.dim() - 2)), 1)
