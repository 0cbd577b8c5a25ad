"""Trainer's model card, replaced."""

from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_rnn_trainers.model_card.card import FORECASTS, Evaluation, Training, make_card, task
from hf_rnn_trainers.model_card.files import others

logger = logging.get_logger(__name__)

EVAL_RESULTS = Path(".eval_results") / "hf_rnn.yaml"
# Arguments that say where and how often, not how
_UNSAID = (
    *("output_dir", "logging_", "save_", "eval_", "hub_", "push_", "report_to", "run_name", "disable_tqdm", "use_c"),
    *("dataloader_", "resume_", "do_", "project", "trackio_", "local_rank", "load_best", "restore_", "activation_"),
    "gradient_checkpointing",
)


class ModelCardMixin(Trainer):
    """A Trainer whose `create_model_card`, which `push_to_hub` also calls, describes this run in README.md.

    Attributes:
        card_papers: keys of the method's papers in `papers.BIBTEX`.
    """

    args: Any
    card_papers: tuple[str, ...] = ("werbos1990bptt",)

    def card_method(self) -> str:
        """How gradients are computed, as a part of a sentence."""
        return "backpropagation through time"

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md into `output_dir`, and with the name of a dataset on the Hub (`dataset_tags`) the measured
        losses into `.eval_results`, from where the Hub reads them.

        Args:
            language: of the text, its ISO code.
            license: of the weights; None: the card says that none is stated.
            tags: of the Hub, beside the package's.
            model_name: by which the card loads the model; default: `hub_model_id`, or the output folder's name.
            finetuned_from: the model on the Hub that this one started from.
            dataset_tags: the dataset's name on the Hub.
            dataset: the data in words.
            tasks, dataset_args: Trainer's; not used.
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "peft_config"):  # adapters: PEFT's card says how to load them
            super().create_model_card(language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset)
            return
        folder = Path(str(self.args.output_dir))
        metrics = final_metrics(self.state.log_history)
        measured = Evaluation("Evaluation", self._evaluated_on(task(model)), ["measured", "value"], metrics.items())
        hub_dataset = dataset_tags[0] if isinstance(dataset_tags, list) else dataset_tags
        card = make_card(
            self.hub_model_id or model_name or folder.name,
            model,
            self._training(dataset, hub_dataset),
            [measured] if metrics else [],
            license,
            language,
            [tags] if isinstance(tags, str) else tags or [],
            finetuned_from,
            self.args.world_size,
        )
        card.save(folder / "README.md")
        if hub_dataset is not None:
            write_eval_results(folder, hub_dataset, task(model), metrics)

    def _training(self, dataset: str | list[str] | None, hub_dataset: str | None) -> Training:
        words = [dataset] if isinstance(dataset, str) else dataset or []
        data = ", ".join(words) or hub_dataset or self._describe_data()
        steps = f"{self.state.global_step:,} steps of {self._train_batch_size * self.args.world_size} sequences"
        accumulated = self.args.gradient_accumulation_steps
        steps += f", each of {accumulated} such batches" if accumulated > 1 else ""
        text = f"Data: {data}. Trained with `{type(self).__name__}` by {self.card_method()}: {steps}."
        return Training(text, said_arguments(self.args), self.card_papers, hub_dataset)

    def _describe_data(self) -> str:
        try:
            return f"{len(self.train_dataset):,} sequences"  # type: ignore[arg-type]
        except TypeError:  # a stream, or none
            return "data that was not named"

    def _evaluated_on(self, what: str) -> str:
        unit = ", losses are cross-entropy in nats per token" if what in ("text-generation", "fill-mask") else ""
        unit = ", losses are quantile losses in each series' own scale" if what == FORECASTS else unit
        return f"After {self.state.global_step:,} steps; `eval_` means on held-out data{unit}."

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is None:  # push_to_hub, which uploads what is saved here
            self._write_code()

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Trainer's, called when one is made that will push: what it could not push is told before it trains."""
        self._refuse_others()
        super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """Trainer's, which uploads all of `output_dir` but checkpoints.

        Raises:
            ValueError: the folder has files that do not belong to a checkpoint, such as a text; `hf-rnn push` leaves
                them out.
        """
        self._refuse_others()
        return super().push_to_hub(*args, **kwargs)

    def _refuse_others(self) -> None:
        if names := others(str(self.args.output_dir)):
            raise ValueError(
                f"output_dir: {self.args.output_dir} holds {', '.join(names[:5])}, which do not belong to a "
                "checkpoint, and a push would upload them; move them, or save without push_to_hub and use `hf-rnn push`"
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer's, which uploads output_dir, with card and code in it; not with what is none of a checkpoint's."""
        if names := others(str(self.args.output_dir)):
            logger.warning(f"not pushed: output_dir holds {', '.join(names[:5])}, which do not belong to a checkpoint")
            return
        pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pushing and not self.args.hub_always_push:
            return  # as Trainer does, but before the files that are on their way are written anew
        self._write_code()
        self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _write_code(self) -> None:
        """Write the code with which the checkpoint loads without the package, if the model can."""
        model = self.accelerator.unwrap_model(self.model)
        knows = hasattr(model, "write_code") and not hasattr(model, "peft_config")
        if knows and self.is_world_process_zero():
            model.write_code(str(self.args.output_dir))


def final_metrics(log_history: list[dict[str, float]]) -> dict[str, float]:
    """The last value of everything measured by evaluation or at the end of training."""
    last: dict[str, float] = {}
    for entry in log_history:
        last |= {name: value for name, value in entry.items() if isinstance(value, int | float)}
    speed = ("_runtime", "_per_second", "_flos")
    return {
        name: float(value)
        for name, value in last.items()
        if (name.startswith("eval_") or name == "train_loss") and not name.endswith(speed)
    }


def said_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Arguments that another run needs to do the same: a method's own, and of Trainer's those that differ from its
    defaults, with those that every run has."""
    always = {"learning_rate", "per_device_train_batch_size", "num_train_epochs", "optim", "seed", "weight_decay"}
    always |= {"lr_scheduler_type"}
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    said = {}
    for f in fields(args):
        value = getattr(args, f.name)
        own = f.name not in defaults
        wanted = f.init and (own or f.name in always or value != defaults[f.name]) and not f.name.startswith(_UNSAID)
        if wanted and value != "" and isinstance(value, int | float | str | Enum):  # others are Trainer's bookkeeping
            said[f.name] = value.value if isinstance(value, Enum) else value
    return said


def write_eval_results(folder: Path, dataset: str, what: str, metrics: dict[str, float]) -> Path:
    """The measured values in the form that the Hub reads from a repository, huggingface_hub's `EvalResultEntry`."""
    entries = [
        EvalResultEntry(dataset_id=dataset, task_id=what, value=value, notes=name) for name, value in metrics.items()
    ]
    path = folder / EVAL_RESULTS
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml_dump(eval_result_entries_to_yaml(entries)))
    return path
