"""The README.md of a checkpoint, made from the model and the run that trained it."""

from hf_rnn_trainers.model_card.card import Evaluation, Training, make_card, write_first_card
from hf_rnn_trainers.model_card.trainer import ModelCardMixin

__all__ = ["Evaluation", "ModelCardMixin", "Training", "make_card", "write_first_card"]
