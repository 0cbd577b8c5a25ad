"""Loads this checkpoint through the hf_rnn package: `pip install hf-rnn`."""

from hf_rnn import (
    MinGRUConfig,
    MinGRUForCausalLM,
    MinGRUForCTC,
    MinGRUForMaskedLM,
    MinGRUForPrediction,
    MinGRUForQuestionAnswering,
    MinGRUForSequenceClassification,
    MinGRUForTokenClassification,
    MinGRUModel,
)

__all__ = [
    "MinGRUConfig",
    "MinGRUForCTC",
    "MinGRUForCausalLM",
    "MinGRUForMaskedLM",
    "MinGRUForPrediction",
    "MinGRUForQuestionAnswering",
    "MinGRUForSequenceClassification",
    "MinGRUForTokenClassification",
    "MinGRUModel",
]
