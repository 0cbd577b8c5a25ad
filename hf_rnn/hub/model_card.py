"""The README.md of a checkpoint, filled in from the run that made it."""

from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_rnn_trainers import DMTConfig, RateConstrainedConfig, SMTConfig, ZOConfig

TEMPLATE = Path(__file__).with_name("model_card_template.md")


def write_model_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    data,
    arguments: TrainingArguments,
    metrics: dict[str, float],
) -> Path:
    """Write `README.md` into `folder`.

    Args:
        data: what it was trained on, with `data`, `block_size` and `held_out`.
        arguments: how it was trained.
        metrics: what came out, `bits_per_byte` among them.
    """
    architecture = type(model).__name__.removesuffix("ForCausalLM")
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_rnn", "recurrent", model.config.model_type],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        architecture=architecture,
        equation=(type(model.model.layers[0].mixer).__doc__ or "").strip().splitlines()[0],
        name=Path(folder).name,
        parameters=f"{model.num_parameters():,}",
        vocabulary=len(tokenizer),
        dataset=Path(data.data).name if Path(data.data).exists() else data.data,
        data=data,
        arguments=arguments,
        method=_method(arguments),
        metrics={name: value for name, value in metrics.items() if isinstance(value, int | float)},
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        versions={name: version(name) for name in ("hf-rnn", "torch", "transformers")},
    )
    path = Path(folder) / "README.md"
    card.save(path)
    return path


def _method(arguments: TrainingArguments) -> str:
    """How gradients were come by."""
    if isinstance(arguments, SMTConfig):
        return "Supervised Memory Training (one step at a time, from the memories of a transformer, in `teacher`)"
    if isinstance(arguments, DMTConfig):
        return "DAgger Memory Training (its own rollouts, pulled back to the memories of a transformer, in `teacher`)"
    if isinstance(arguments, RateConstrainedConfig):
        return "backpropagation through time with a rate term (weights pulled towards what costs few bits; `rate.png`)"
    if not isinstance(arguments, ZOConfig):
        return "backpropagation through time"
    return (
        f"zero-order estimates ({arguments.estimator}, {arguments.num_directions} {arguments.directions} directions, "
        f"epsilon {arguments.epsilon:g}; zo_replay.jsonl rebuilds the weights from those before training)"
    )
