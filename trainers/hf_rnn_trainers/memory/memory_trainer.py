"""What SMT and DMT share: a student with a teacher beside it, in training, checkpoints and evaluation."""

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_rnn_trainers.base import RecurrentTrainer
from hf_rnn_trainers.base.sharding import refuse_sharding
from hf_rnn_trainers.memory.memory_config import MemoryTrainingConfig
from hf_rnn_trainers.memory.rollouts import errors
from hf_rnn_trainers.memory.teacher import SMTTeacher, memory_shape
from hf_rnn_trainers.memory.windows import Sequences, sequences

TEACHER = "teacher"  # the folder of a checkpoint that holds it
MEASURED = 64  # rows on which an evaluation measures the drift


def load_teacher(path: str | Path) -> SMTTeacher:
    """From its folder, or from the `teacher` folder of a student's."""
    inside = Path(path) / TEACHER
    folder = inside if inside.is_dir() else Path(path)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():  # it could name files elsewhere; no trainer writes one
        raise ValueError(f"teacher: {folder} has its weights in several files; expected one, {SAFE_WEIGHTS_NAME}")
    try:
        return SMTTeacher.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher: found none in {path} ({error})") from error


class Losses(nn.Module):
    """Student and teacher as one module, so that their gradients are shared over processes together.

    `forward` takes x, y and lengths (see `windows`) and a generator, and returns the terms; `loss` among them.
    """

    student: Any

    def __init__(self, student: Any, args: Any):
        super().__init__()
        self.student = student
        self.args = args


class MemoryTrainer(RecurrentTrainer, ABC):
    """Trainer of a student by a teacher's memories. A subclass makes `losses`, the module that is trained.

    Attributes:
        teacher: the `SMTTeacher`, saved in the folder `teacher` of every checkpoint, never inside the student's; or
            None, of a `DMTTrainer` with `teacher=False`.
    """

    args: Any
    model: Any
    state: Any
    config_class: type[MemoryTrainingConfig] = MemoryTrainingConfig
    card_papers = ("kumar2026smt",)
    no_pieces = "each step is trained by itself, from a memory that a teacher made: no gradient runs through time"

    def __init__(self, model=None, args=None, teacher: SMTTeacher | str | Path | bool | None = None, **kwargs):
        if model is not None:
            memory_shape(model)
        if kwargs.get("model_init") is not None:
            raise ValueError(
                "model_init: the teacher fits one student; pass a model, and in a search make a trainer for each trial"
            )
        super().__init__(model, args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: this trainer has its own loss; leave it out")
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel: start a process for each GPU instead (accelerate launch)")
        self.teacher = self._find_teacher(teacher)
        self.losses = self.make_losses()
        if self.optimizer is not None and self.teacher is not None:
            given = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if any(p.requires_grad and id(p) not in given for p in self.teacher.parameters()):
                raise ValueError("optimizers: expected an optimizer of the teacher's parameters as well as the model's")
        self.model_accepts_loss_kwargs = False  # the loss is a mean, divided by the accumulation steps
        self._count_terms_anew()
        self._measured: list[tuple[int, dict[str, Tensor]]] = []  # rows and terms of the evaluation going on

    def _find_teacher(self, teacher: SMTTeacher | str | Path | bool | None) -> SMTTeacher | None:
        if teacher is False:
            return None
        if teacher is True:
            raise ValueError("teacher: expected an SMTTeacher, where one was saved, None or False, got True")
        teacher = self.new_teacher() if teacher is None else teacher
        found = teacher if isinstance(teacher, SMTTeacher) else load_teacher(teacher)
        found.check_fits(self.model)
        return found.to(self.args.device)

    def _count_terms_anew(self) -> None:
        self._draws = (-1, 0)  # the step, and batches of it so far
        self._terms: dict[str, Tensor] = {}  # sum and number of each since the last log

    def _inner_training_loop(self, *args, **kwargs):
        self.losses = self.make_losses()  # anew, since another trainer may have frozen the teacher meanwhile
        self._count_terms_anew()
        return super()._inner_training_loop(*args, **kwargs)

    def check_sharding(self) -> None:
        refuse_sharding(self, "two networks train together, by single steps")

    @abstractmethod
    def new_teacher(self) -> SMTTeacher:
        """Where none was given."""

    @abstractmethod
    def make_losses(self) -> Losses:
        """What the student, with the teacher, is trained by."""

    # Training: both networks in the place of the one

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_both(model, *args, evaluation_mode=False, **kwargs):
            trained = model is self.model and not evaluation_mode
            return prepare(self.losses if trained else model, *args, evaluation_mode=evaluation_mode, **kwargs)

        self.accelerator.prepare_model = prepare_both

    def create_optimizer(self, model=None):
        return super().create_optimizer(self.losses if model is None else model)

    def _clip_grad_norm(self, model):
        """Each network for itself, as the paper has it: the teacher's gradients are the larger ones."""
        self.accelerator.unscale_gradients()
        networks = [self.model] if self.teacher is None else [self.model, self.teacher]
        norms = [nn.utils.clip_grad_norm_(network.parameters(), self.args.max_grad_norm) for network in networks]
        return norms[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """In training the method's loss; in evaluation that of the student alone, from the empty memory."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        terms = model(*self._sequences(inputs), self._generator())
        for name, value in terms.items():
            known = value.detach().isfinite()  # a term without targets is NaN
            pair = torch.stack([value.detach().nan_to_num(), known.to(value.dtype)])
            if name != "loss":
                self._terms[name] = pair + self._terms.get(name, 0)
        return (terms["loss"], terms) if return_outputs else terms["loss"]

    def _sequences(self, inputs: dict[str, Any]) -> Sequences:
        packed = [name for name in ("position_ids", "cu_seq_lens_q", "seq_idx") if inputs.get(name) is not None]
        if packed:
            raise ValueError(f"{packed[0]}: memories are of one sequence a row; pad instead of packing")
        if inputs.get("input_ids") is None or inputs.get("labels") is None:
            raise ValueError(f"inputs: expected input_ids and labels, got {sorted(inputs)}")
        return sequences(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"))

    def _generator(self) -> torch.Generator:
        """Random numbers that are a function of the step, so that a resumed run draws the same."""
        step, batch = self.state.global_step, self._draws[1] + 1 if self._draws[0] == self.state.global_step else 0
        self._draws = (step, batch)
        seed = random.Random(f"{self.args.seed} {self.args.process_index} {step} {batch}").getrandbits(63)
        return torch.Generator().manual_seed(seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the mean of each term of the loss since the last time."""
        if "loss" in logs and self._terms:
            pairs = {name: self.accelerator.reduce(pair, "sum").tolist() for name, pair in self._terms.items()}
            logs = logs | {name: total / count for name, (total, count) in pairs.items() if count}
            self._terms = {}
        super().log(logs, start_time)

    # Checkpoints: the student where Trainer puts it, the teacher in a folder beside it

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.teacher is not None:
            self.teacher.save_pretrained(Path(output_dir or self.args.output_dir) / TEACHER)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_teacher(Path(resume_from_checkpoint))

    def _load_best_model(self):
        super()._load_best_model()
        self._load_teacher(Path(self.state.best_model_checkpoint))

    def _load_teacher(self, checkpoint: Path) -> None:
        if self.teacher is None:
            return
        path = checkpoint / TEACHER / SAFE_WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: {checkpoint} has no teacher, {path} is missing")
        self.teacher.load_state_dict(load_file(path))

    # Evaluation: the student's own rollout, and what the teacher says of it

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with self.accelerator.autocast():
            result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            if inputs.get("labels") is not None:
                self._measure(self._sequences(self._prepare_inputs(inputs)))
        return result

    @torch.no_grad()
    def _measure(self, batch: Sequences) -> None:
        """The loss terms on this batch, and in the first the drift over the rollout."""
        self.losses.eval()
        with self.compute_loss_context_manager():
            terms = self.losses(*batch, torch.Generator().manual_seed(self.args.seed + len(self._measured)))
            if not self._measured and self.teacher is not None:
                terms |= self._drift(batch, self.teacher)
        del terms["loss"]
        known = {name: value.detach().cpu() for name, value in terms.items() if value.isfinite()}
        self._measured.append((len(batch.x), known))

    def _drift(self, batch: Sequences, teacher: SMTTeacher) -> dict[str, Tensor]:
        x, lengths = batch.x[:MEASURED], batch.lengths[:MEASURED]
        every, last = self.args.label_every, x.shape[1] - 1
        positions = torch.tensor(sorted({*range(every - 1, last, every), last}), device=x.device)
        error = errors(self.model, teacher, x, positions, self.args.context_size)
        real = positions < lengths[:, None]
        at_end = (real.sum(1, keepdim=True) - 1).clamp(min=0)
        return {"drift": error[real].mean(), "drift_last": error.gather(1, at_end)[real.any(1)].mean()}

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._measured = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        measured = gather_object(self._measured)
        metrics: dict[str, float] = output.metrics or {}
        for name in sorted({name for _, terms in measured for name in terms}):
            weighted = [(rows, float(terms[name])) for rows, terms in measured if name in terms]
            total = sum(rows for rows, _ in weighted)
            metrics[f"{metric_key_prefix}_{name}"] = sum(rows * value for rows, value in weighted) / total
        return output
