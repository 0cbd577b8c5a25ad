"""Loads this checkpoint through the hf_rnn package: `pip install hf-rnn`."""

from hf_rnn import (
    MinGRUConfig,
    MinGRUModel,
    MinGRUForCausalLM,
    MinGRUForCTC,
    MinGRUForMaskedLM,
    MinGRUForQuestionAnswering,
    MinGRUForSequenceClassification,
    MinGRUForTokenClassification,
    MinGRUForPrediction,
)

__all__ = [
    "MinGRUConfig",
    "MinGRUModel",
    "MinGRUForCausalLM",
    "MinGRUForCTC",
    "MinGRUForMaskedLM",
    "MinGRUForQuestionAnswering",
    "MinGRUForSequenceClassification",
    "MinGRUForTokenClassification",
    "MinGRUForPrediction",
]
