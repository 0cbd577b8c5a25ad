from hf_rnn.forecasting.embedding import EmbeddingMixin
from hf_rnn.forecasting.prediction import PredictionMixin
from hf_rnn.forecasting.streaming import StreamMixin


class ForecasterMixin(PredictionMixin, StreamMixin, EmbeddingMixin):
    """What every forecaster can do: `predict`, `observe`, `score`, `embed`."""
