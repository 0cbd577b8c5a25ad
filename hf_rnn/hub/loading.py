"""Checkpoints as what they were saved as."""

import transformers
from transformers import AutoConfig, PreTrainedModel

import hf_rnn


def load(checkpoint: str) -> PreTrainedModel:
    """The model as what it was saved as.

    Raises:
        ValueError: its class is neither transformers' nor the package's, or weights are missing.
    """
    name = (AutoConfig.from_pretrained(checkpoint).architectures or ["none"])[0]
    model_class = getattr(transformers, name, None) or getattr(hf_rnn, name, None)
    if model_class is None:
        raise ValueError(f"checkpoint: its class {name} is not known here; use hf_rnn.save_compressed")
    model, info = model_class.from_pretrained(checkpoint, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"checkpoint: {checkpoint} lacks {sorted(info['missing_keys'])[:3]}")
    return model
