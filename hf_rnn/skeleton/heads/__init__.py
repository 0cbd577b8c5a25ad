"""What a backbone is asked beside the next token, under transformers' names."""

from hf_rnn.skeleton.heads.ctc import RecurrentForCTC
from hf_rnn.skeleton.heads.prediction import RecurrentForPrediction
from hf_rnn.skeleton.heads.question_answering import RecurrentForQuestionAnswering
from hf_rnn.skeleton.heads.sequence_classification import RecurrentForSequenceClassification
from hf_rnn.skeleton.heads.tokens import RecurrentForMaskedLM, RecurrentForTokenClassification

__all__ = [
    "RecurrentForCTC",
    "RecurrentForMaskedLM",
    "RecurrentForPrediction",
    "RecurrentForQuestionAnswering",
    "RecurrentForSequenceClassification",
    "RecurrentForTokenClassification",
]
