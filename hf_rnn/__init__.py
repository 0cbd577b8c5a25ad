"""Recurrent networks as first-class citizens of the Hugging Face stack.

`import hf_rnn` registers every architecture with transformers' Auto classes. Names are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING

from hf_rnn._version import __version__
from hf_rnn.skeleton.configuration_recurrent import HEADS

# Every architecture: what its classes' names begin with, and its room in hf_rnn.models
ARCHITECTURES = {
    "GRU": "gru",
    "LSTM": "lstm",
    "MemoryRNN": "memory",
    "MinGRU": "mingru",
    "MinLSTM": "minlstm",
    "XLSTM": "xlstm",
}
# And those that forecast alone
FORECASTERS = {"TiRex2": "tirex2"}

_MODULES = {
    "RecurrentCache": "hf_rnn.skeleton.cache",
    "PromptCache": "hf_rnn.generation.prompt_cache",
    "RecurrentConfig": "hf_rnn.skeleton.configuration_recurrent",
    "StatefulModel": "hf_rnn.exchange.export",
    "export_model": "hf_rnn.exchange.export",
    "to_onnx": "hf_rnn.exchange.export",
    "from_flashrnn": "hf_rnn.exchange.gate_order",
    "to_flashrnn": "hf_rnn.exchange.gate_order",
    "from_onnx_node": "hf_rnn.exchange.gate_order",
    "to_onnx_node": "hf_rnn.exchange.gate_order",
    "WeightOnlyConfig": "hf_rnn.compression.weight_only",
    "bits_per_byte": "hf_rnn.tasks.evaluation",
    "pretrained": "hf_rnn.checkpoints",
    "CorruptPayloadError": "hf_rnn_kernels.coding",
    "byte_tokenizer": "hf_rnn.tokenization.byte_tokenizer",
    "compress": "hf_rnn.compression.checkpoint",
    "SequenceLayout": "hf_rnn_kernels",
    "gru_scan": "hf_rnn_kernels",
    "linear_scan": "hf_rnn_kernels",
    "lstm_scan": "hf_rnn_kernels",
    "min_gru_scan": "hf_rnn_kernels",
    "min_lstm_scan": "hf_rnn_kernels",
    "mlstm_scan": "hf_rnn_kernels",
    "mean_pooling": "hf_rnn.skeleton.heads.sequences",
    "prune": "hf_rnn.compression.prune",
    "save_compressed": "hf_rnn.compression.checkpoint",
    "weight_curvature": "hf_rnn.compression.curvature",
    "slstm_scan": "hf_rnn_kernels",
    "DMTConfig": "hf_rnn_trainers",
    "DMTTrainer": "hf_rnn_trainers",
    "MemoryProtocol": "hf_rnn_trainers",
    "NonFiniteLossError": "hf_rnn_trainers",
    "RateCallback": "hf_rnn_trainers",
    "RateConstrainedConfig": "hf_rnn_trainers",
    "RateConstrainedTrainer": "hf_rnn_trainers",
    "CheckpointError": "hf_rnn_trainers",
    "RecurrentTrainer": "hf_rnn_trainers",
    "RecurrentTrainingArguments": "hf_rnn_trainers",
    "SMTConfig": "hf_rnn_trainers",
    "SMTTeacher": "hf_rnn_trainers",
    "SMTTeacherConfig": "hf_rnn_trainers",
    "SMTTrainer": "hf_rnn_trainers",
    "ZOConfig": "hf_rnn_trainers",
    "ZOTrainer": "hf_rnn_trainers",
    "accept_checkpoint": "hf_rnn_trainers",
}
for _stem, _name in ARCHITECTURES.items():
    _MODULES[f"{_stem}Config"] = f"hf_rnn.models.{_name}.configuration_{_name}"
    for _suffix in ("Model", "ForPrediction", *HEADS):
        _MODULES[f"{_stem}{_suffix}"] = f"hf_rnn.models.{_name}.modeling_{_name}"
for _stem, _name in FORECASTERS.items():
    _MODULES[f"{_stem}Config"] = f"hf_rnn.models.{_name}.configuration_{_name}"
    for _suffix in ("Model", "ForPrediction", "ForSequenceClassification"):
        _MODULES[f"{_stem}{_suffix}"] = f"hf_rnn.models.{_name}.modeling_{_name}"

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'hf_rnn' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    """Tell transformers' Auto classes about every architecture.

    The Auto classes are asked for a model class by its config's, so the modeling files are imported here; what is
    slow, triton and numba, waits for the first call of a kernel.
    """
    import transformers

    import hf_rnn.compression.quantizer  # registers the reader of compressed checkpoints

    for stem in (*ARCHITECTURES, *FORECASTERS):
        config = __getattr__(f"{stem}Config")
        transformers.AutoConfig.register(config.model_type, config)
        for auto, name in config.auto_classes().items():
            getattr(transformers, auto).register(config, __getattr__(name))


_register()

if TYPE_CHECKING:
    from hf_rnn.checkpoints import pretrained
    from hf_rnn.compression.checkpoint import compress, save_compressed
    from hf_rnn.compression.curvature import weight_curvature
    from hf_rnn.compression.prune import prune
    from hf_rnn.compression.weight_only import WeightOnlyConfig
    from hf_rnn.exchange.export import StatefulModel, export_model, to_onnx
    from hf_rnn.exchange.gate_order import from_flashrnn, from_onnx_node, to_flashrnn, to_onnx_node
    from hf_rnn.generation.prompt_cache import PromptCache
    from hf_rnn.models.gru.configuration_gru import GRUConfig
    from hf_rnn.models.gru.modeling_gru import (
        GRUForCausalLM,
        GRUForCTC,
        GRUForMaskedLM,
        GRUForPrediction,
        GRUForQuestionAnswering,
        GRUForSequenceClassification,
        GRUForTokenClassification,
        GRUModel,
    )
    from hf_rnn.models.lstm.configuration_lstm import LSTMConfig
    from hf_rnn.models.lstm.modeling_lstm import (
        LSTMForCausalLM,
        LSTMForCTC,
        LSTMForMaskedLM,
        LSTMForPrediction,
        LSTMForQuestionAnswering,
        LSTMForSequenceClassification,
        LSTMForTokenClassification,
        LSTMModel,
    )
    from hf_rnn.models.memory.configuration_memory import MemoryRNNConfig
    from hf_rnn.models.memory.modeling_memory import (
        MemoryRNNForCausalLM,
        MemoryRNNForCTC,
        MemoryRNNForMaskedLM,
        MemoryRNNForPrediction,
        MemoryRNNForQuestionAnswering,
        MemoryRNNForSequenceClassification,
        MemoryRNNForTokenClassification,
        MemoryRNNModel,
    )
    from hf_rnn.models.mingru.configuration_mingru import MinGRUConfig
    from hf_rnn.models.mingru.modeling_mingru import (
        MinGRUForCausalLM,
        MinGRUForCTC,
        MinGRUForMaskedLM,
        MinGRUForPrediction,
        MinGRUForQuestionAnswering,
        MinGRUForSequenceClassification,
        MinGRUForTokenClassification,
        MinGRUModel,
    )
    from hf_rnn.models.minlstm.configuration_minlstm import MinLSTMConfig
    from hf_rnn.models.minlstm.modeling_minlstm import (
        MinLSTMForCausalLM,
        MinLSTMForCTC,
        MinLSTMForMaskedLM,
        MinLSTMForPrediction,
        MinLSTMForQuestionAnswering,
        MinLSTMForSequenceClassification,
        MinLSTMForTokenClassification,
        MinLSTMModel,
    )
    from hf_rnn.models.tirex2.configuration_tirex2 import TiRex2Config
    from hf_rnn.models.tirex2.modeling_tirex2 import (
        TiRex2ForPrediction,
        TiRex2ForSequenceClassification,
        TiRex2Model,
    )
    from hf_rnn.models.xlstm.configuration_xlstm import XLSTMConfig
    from hf_rnn.models.xlstm.modeling_xlstm import (
        XLSTMForCausalLM,
        XLSTMForCTC,
        XLSTMForMaskedLM,
        XLSTMForPrediction,
        XLSTMForQuestionAnswering,
        XLSTMForSequenceClassification,
        XLSTMForTokenClassification,
        XLSTMModel,
    )
    from hf_rnn.skeleton.cache import RecurrentCache
    from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig
    from hf_rnn.skeleton.heads.sequences import mean_pooling
    from hf_rnn.tasks.evaluation import bits_per_byte
    from hf_rnn.tokenization.byte_tokenizer import byte_tokenizer
    from hf_rnn_kernels import (
        SequenceLayout,
        gru_scan,
        linear_scan,
        lstm_scan,
        min_gru_scan,
        min_lstm_scan,
        mlstm_scan,
        slstm_scan,
    )
    from hf_rnn_kernels.coding import CorruptPayloadError
    from hf_rnn_trainers import (
        CheckpointError,
        DMTConfig,
        DMTTrainer,
        MemoryProtocol,
        NonFiniteLossError,
        RateCallback,
        RateConstrainedConfig,
        RateConstrainedTrainer,
        RecurrentTrainer,
        RecurrentTrainingArguments,
        SMTConfig,
        SMTTeacher,
        SMTTeacherConfig,
        SMTTrainer,
        ZOConfig,
        ZOTrainer,
        accept_checkpoint,
    )
