"""`hf-rnn train`: train a language model on your text, or a model for another task on a table."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_rnn import (
    ARCHITECTURES,
    DMTConfig,
    DMTTrainer,
    RateConstrainedConfig,
    RateConstrainedTrainer,
    RecurrentTrainer,
    RecurrentTrainingArguments,
    SMTConfig,
    SMTTrainer,
    ZOConfig,
    ZOTrainer,
    byte_tokenizer,
)
from hf_rnn.cli.data import blocks, cut_documents, read_documents, tokenize
from hf_rnn.cli.plot import plot_losses
from hf_rnn.cli.settings import read_settings
from hf_rnn.cli.tasks import MODELS, answers, prepare
from hf_rnn.cli.train_forecaster import train_forecaster
from hf_rnn.forecasting.frames import ID, TIME, VALUE
from hf_rnn.skeleton.configuration_hybrid import HybridConfig
from hf_rnn.tasks.evaluation import bits_per_byte
from hf_rnn.tokenization.reading import read_tokenizer


@dataclass
class ModelArguments:
    task: str = field(
        default="causal-lm",
        metadata={
            "help": f"causal-lm, or one of {', '.join(MODELS)}, with backpropagation only; new models for these "
            "read in both directions, unless --config has bidirectional=False; or forecasting, with "
            "backpropagation, zo or rate"
        },
    )
    trainer: str = field(
        default="backpropagation",
        metadata={
            "help": "backpropagation; zo: zero-order, without gradients; smt, dmt: from a teacher's memories; "
            "rate: towards weights of few bits. Each has options of its own: add --help"
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": f"an architecture ({', '.join(ARCHITECTURES.values())}) to train from scratch, or a checkpoint; "
            "default: mingru; with smt memory, with dmt the checkpoint beside the teacher"
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "dmt (and smt, to train it further): the folder that an smt run saved, or the teacher's in it; "
            "none (dmt with --readout_steps): truncated backpropagation without a teacher"
        },
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "smt, dmt: defaults for a kind of task: dense (text, pixels: every token has a label), rare (few "
            "labels, far from what they depend on) or paper; options that you give override them"
        },
    )
    config: str = field(
        default="",
        metadata={
            "help": "settings of a new model, as in its config class, such as hidden_size=256,num_hidden_layers=2,"
            "layer_types=['linear_attention','sliding_attention']"
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "a tokenizer's folder or name; default: the checkpoint's own, or a byte tokenizer"},
    )

    def __post_init__(self):
        if self.task not in (tasks := ["causal-lm", "forecasting", *MODELS]):
            raise ValueError(f"task: expected one of {tasks}, got {self.task!r}")
        if self.task == "forecasting" and self.trainer not in ("backpropagation", "zo", "rate"):
            raise ValueError(f"trainer: forecasting trains by backpropagation, zo or rate, got {self.trainer!r}")
        if self.task in MODELS and self.trainer != "backpropagation":
            raise ValueError(f"trainer: {self.task} trains by backpropagation, got {self.trainer!r}")
        if self.teacher is not None and self.trainer not in ("smt", "dmt"):
            raise ValueError(f"teacher: only smt and dmt have one, got --trainer {self.trainer}")
        if self.preset is not None and self.trainer not in ("smt", "dmt"):
            raise ValueError(f"preset: only smt and dmt have some, got --trainer {self.trainer}")
        if self.teacher == "none":
            self.model = self.model or "memory"
        elif self.model is None:
            # Beside a teacher lies its student: in the folder given, or in the one that this is the `teacher` of
            student = self.teacher if self.teacher is None or (Path(self.teacher) / "teacher").is_dir() else None
            if student is None and self.teacher is not None:
                student = str(Path(self.teacher).parent)
            self.model = {"smt": student or "memory", "dmt": student}.get(self.trainer, "mingru")
        if self.trainer == "dmt":
            if self.model is None:
                raise ValueError("teacher: expected the folder that `hf-rnn train --trainer smt` saved")
            self.teacher = self.teacher or self.model


@dataclass
class DataArguments:
    data: str = field(
        metadata={
            "help": "a text file, a folder saved by `datasets`, or a dataset's name on the Hub; for other "
            "tasks also a csv, json, jsonl or parquet file; for forecasting a csv or parquet file with a row for each "
            "series and time"
        }
    )
    split: str = field(default="train", metadata={"help": "split of a dataset"})
    text_column: str = field(
        default="text",
        metadata={"help": "column of the text; for token-classification of the list of words"},
    )
    label_column: str = field(
        default="label",
        metadata={
            "help": "column of the class, list of classes or number; for token-classification of the words' classes"
        },
    )
    block_size: int = field(
        default=512,
        metadata={
            "help": "tokens in a training sequence (with labels: at most); with --stream: in each row of a batch"
        },
    )
    held_out: float = field(
        default=0.05,
        metadata={
            "help": "share to evaluate on: of a text its end, of a table random rows; of series always the last "
            "prediction_length steps, unless this is 0"
        },
    )
    id_column: str = field(default=ID, metadata={"help": "column that names the series of a row"})
    time_column: str = field(default=TIME, metadata={"help": "column of the times"})
    value_column: str = field(default=VALUE, metadata={"help": "column of the values"})
    season: int = field(default=1, metadata={"help": "steps of a season of the series, to scale MASE"})

    def __post_init__(self):
        if self.block_size < 2:
            raise ValueError(f"block_size: expected at least 2 tokens, got {self.block_size}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share in [0, 1), got {self.held_out}")


@dataclass
class RunDefaults:
    """What `hf-rnn train` sets otherwise than TrainingArguments, whatever the trainer."""

    output_dir: str | None = field(default="runs/model", metadata={"help": "folder for the checkpoint"})
    per_device_train_batch_size: int = 8
    num_train_epochs: float = 10.0
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: str = "none"
    use_cache: bool = True  # what the saved config says: the state is small, and not returned in training in any case
    use_cpu: bool = field(
        default=False,
        metadata={"help": "train on the CPU; default: on all GPUs; CUDA_VISIBLE_DEVICES=1 picks one"},
    )


@dataclass
class TrainArguments(RunDefaults, RecurrentTrainingArguments):
    """TrainingArguments, with defaults for training a small recurrent model from scratch."""

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "default: 1.28 / hidden_size, at most 0.02; for a memory RNN 3e-3"}
    )
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03


@dataclass
class RateTrainArguments(TrainArguments, RateConstrainedConfig):
    """A RateConstrainedConfig, with defaults for training a small recurrent model from scratch."""


@dataclass
class ZOTrainArguments(RunDefaults, ZOConfig):
    """A ZOConfig, with defaults for training a small recurrent model from scratch."""

    learning_rate: float = 3e-3
    optim: str = field(default="adamw_torch", metadata={"help": "sgd needs no memory for gradients, but more steps"})


@dataclass
class SMTTrainArguments(RunDefaults, SMTConfig):
    """An SMTConfig, with defaults for training a small recurrent model from scratch."""

    per_device_train_batch_size: int = 16
    learning_rate: float = 1e-3


@dataclass
class DMTTrainArguments(RunDefaults, DMTConfig):
    """A DMTConfig, with defaults for a small model that an smt run trained: a tenth of its rate."""

    per_device_train_batch_size: int = 16
    num_train_epochs: float = 1.0
    learning_rate: float = 1e-4


TRAINERS: dict[str, tuple[Any, Any]] = {
    "backpropagation": (RecurrentTrainer, TrainArguments),
    "zo": (ZOTrainer, ZOTrainArguments),
    "smt": (SMTTrainer, SMTTrainArguments),
    "dmt": (DMTTrainer, DMTTrainArguments),
    "rate": (RateConstrainedTrainer, RateTrainArguments),
}


def default_learning_rate(config: PreTrainedConfig) -> float:
    """Near the best of AdamW with a cosine schedule, where weights start with 1 / sqrt(inputs): it falls with the width
    as muP says (arXiv 2203.03466), 0.02, 0.01 and 0.003 at widths of 64, 128 and 256 (docs/log.md, 2026-11-30)."""
    return min(0.02, 1.28 / config.hidden_size) if isinstance(config, HybridConfig) else 3e-3


def build_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, **labels: Any) -> PreTrainedModel:
    """A pretrained checkpoint, or a new model whose vocabulary is the tokenizer's.

    Args:
        labels: settings of the config that the task's labels make.
    """
    auto: Any = MODELS.get(arguments.task, AutoModelForCausalLM)
    assert arguments.model is not None
    if Path(arguments.model).is_dir() or "/" in arguments.model:
        if arguments.config:
            raise ValueError(
                f"config: the checkpoint {arguments.model} has its own settings; --config is for new models"
            )
        # A head for other labels is new
        return auto.from_pretrained(arguments.model, ignore_mismatched_sizes=bool(labels), **labels)
    names = list(ARCHITECTURES.values())
    if arguments.model not in names:
        raise ValueError(f"model: expected one of {names} or a checkpoint's folder, got {arguments.model!r}")
    settings = dict(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    settings |= {"bidirectional": True} | labels if arguments.task in MODELS else {}
    settings |= read_settings(arguments.model, arguments.config, fixed=("vocab_size",))
    return auto.from_config(AutoConfig.for_model(f"hf_rnn_{arguments.model}", **settings))


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    if arguments.tokenizer is not None:
        return read_tokenizer(arguments.tokenizer)
    if Path(str(arguments.model)).is_dir() or "/" in str(arguments.model):
        return read_tokenizer(str(arguments.model))
    return byte_tokenizer("<|mask|>" if arguments.task == "masked-lm" else None)


def train_task(
    arguments: ModelArguments, data: DataArguments, training: RecurrentTrainingArguments
) -> dict[str, float]:
    """Train a model on one of `MODELS`' tasks, evaluate and save it as `train` does; returns the held-out metrics."""
    if training.stream:
        raise ValueError(f"stream: expected --task causal-lm, got {arguments.task}")
    tokenizer = load_tokenizer(arguments)
    prepared = prepare(arguments.task, data, tokenizer, training.seed)
    model = build_model(arguments, tokenizer, **prepared.config)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters")
    if training.learning_rate is None:
        training.learning_rate = default_learning_rate(model.config)
    trainer = RecurrentTrainer(
        model=model,
        args=training,
        train_dataset=prepared.training,
        eval_dataset=prepared.evaluation,
        data_collator=prepared.collator,
        processing_class=tokenizer,
        compute_metrics=prepared.metrics,
        preprocess_logits_for_metrics=answers,
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    metrics = trainer.evaluate() if prepared.evaluation is not None else {}
    if not training.push_to_hub:
        trainer.save_model()
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, Path(str(training.output_dir)) / "loss.png")
    name = Path(data.data).name if Path(data.data).exists() else data.data
    about = dict(dataset=f"{name}, {100 * data.held_out:g}% held out")
    trainer.push_to_hub(**about) if training.push_to_hub else trainer.create_model_card(**about)
    return metrics


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    data: DataArguments,
    arguments: RecurrentTrainingArguments,
    callbacks: list | None = None,
    **options: Any,
) -> dict[str, float]:
    """Train, evaluate and save: checkpoint, tokenizer, model card and a picture of the losses in `output_dir`.

    Args:
        options: the trainer's own, such as a `teacher`.

    Returns:
        The held-out `bits_per_byte` and the trainer's own metrics.
    """
    folder = Path(str(arguments.output_dir))
    stream, ends = tokenize(documents, tokenizer)
    cut = len(stream) - int(len(stream) * data.held_out)
    if arguments.learning_rate is None:
        arguments.learning_rate = default_learning_rate(model.config)
    held_out = torch.from_numpy(stream[cut:])
    if arguments.stream:
        arguments.stream_length = arguments.stream_length or data.block_size
        separator = tokenizer.eos_token_id if len(documents) > 1 else None
        sets = [cut_documents(part, separator) if len(part) > 1 else None for part in (stream[:cut], stream[cut:])]
    else:
        sets = [blocks(stream[:cut], data.block_size), None]
        if len(held_out) > 1:
            sets[1] = blocks(stream[cut:], min(data.block_size, len(held_out)))
    trainer_class = next((t for t, a in reversed(TRAINERS.values()) if isinstance(arguments, a)), RecurrentTrainer)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=callbacks,
        **options,
    )
    resume = arguments.resume_from_checkpoint
    metrics = trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume).metrics
    if not arguments.push_to_hub:  # else the push at the end saves
        trainer.save_model()
    num_bytes = int(ends[-1] - ends[cut]) if len(held_out) > 1 else 0
    if num_bytes:
        metrics["bits_per_byte"] = bits_per_byte(model, held_out, num_bytes)
        trainer.log({"eval_bits_per_byte": metrics["bits_per_byte"]})
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, folder / "loss.png")
    local = Path(data.data).exists()
    length = arguments.stream_length or data.block_size
    layout = f"as {arguments.train_batch_size * arguments.world_size} streams" if arguments.stream else "in sequences"
    words = f"{Path(data.data).name if local else data.data} {layout} of {length} tokens, the last "
    about: dict[str, Any] = dict(
        dataset=f"{words}{100 * data.held_out:g}% held out", dataset_tags=None if local else data.data
    )
    if arguments.push_to_hub:
        trainer.push_to_hub(**about)
    else:
        trainer.create_model_card(**about)
    return metrics


def check_output(folder: Path) -> None:
    """Refuse to write a checkpoint among files that are none of ours."""
    ours = ("modeling_hf_rnn.py", "checkpoint-*", "_saving", "zo_replay.jsonl", "_non_finite_*")
    if folder.is_dir() and any(folder.iterdir()) and not any(any(folder.glob(pattern)) for pattern in ours):
        raise ValueError(f"output_dir: {folder} holds files and no checkpoint; choose another, or empty it")


def main(argv: list[str]) -> None:
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument("--trainer", default="backpropagation")
    choice.add_argument("--preset")
    chosen = choice.parse_known_args(argv)[0]
    trainer = chosen.trainer
    if trainer not in TRAINERS:
        raise ValueError(f"trainer: expected one of {list(TRAINERS)}, got {trainer!r}")
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, TRAINERS[trainer][1]],  # type: ignore[arg-type]
        prog="hf-rnn train",
        usage="%(prog)s --data DATA [options]",  # all of them are listed below
        description=f"{__doc__} This package's own options come first, then those of transformers' TrainingArguments.",
    )
    if chosen.preset is not None and trainer in ("smt", "dmt"):
        parser.set_defaults(**TRAINERS[trainer][1].preset_settings(chosen.preset))
    model_arguments, data, arguments = parser.parse_args_into_dataclasses(argv)
    check_output(Path(str(arguments.output_dir)))
    set_seed(arguments.seed)
    if model_arguments.task == "forecasting":
        metrics = train_forecaster(model_arguments, data, arguments, TRAINERS[trainer][0])
        for name in ("loss", "mase", "wql", "smape", "coverage_80"):
            if f"eval_{name}" in metrics:
                print(f"held-out {name}: {metrics[f'eval_{name}']:.4f}")
        again = f"hf-rnn forecast {data.data} --model {arguments.output_dir}"
        print(f"saved {arguments.output_dir}; try: {again}")
        return
    if model_arguments.task != "causal-lm":
        for name, value in train_task(model_arguments, data, arguments).items():
            if name.removeprefix("eval_") in ("loss", "accuracy", "rmse", "r2"):
                print(f"held-out {name.removeprefix('eval_')}: {value:.4f}")
        mask = f" {load_tokenizer(model_arguments).mask_token}" if model_arguments.task == "masked-lm" else ""
        print(f"saved {arguments.output_dir}; try: hf-rnn predict {arguments.output_dir} 'a text{mask}'")
        return
    tokenizer = load_tokenizer(model_arguments)
    model = build_model(model_arguments, tokenizer)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters")
    documents = read_documents(data.data, data.split, data.text_column)
    options: dict[str, Any] = {}
    if trainer in ("smt", "dmt"):
        options["teacher"] = False if model_arguments.teacher == "none" else model_arguments.teacher
    metrics = train(model, tokenizer, documents, data, arguments, **options)
    if "bits_per_byte" in metrics:
        print(f"held-out bits per byte: {metrics['bits_per_byte']:.3f}")
    print(f"saved {arguments.output_dir}; try: hf-rnn generate {arguments.output_dir} --prompt 'The '")
