"""Checkpoints that are whole or not there, and runs that go on from a whole one or say why not."""

import math
import os
import random
import shutil
import sys
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import Trainer, set_seed
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from hf_rnn_trainers.reliability.manifest import (
    NO_MANIFEST,
    check_readable,
    checkpoints,
    find_damage,
    find_missing,
    flush,
    flush_one,
    newest_whole,
    next_order,
    order_of,
    read_manifest,
    write_manifest,
)

logger = logging.get_logger(__name__)

ON_PURPOSE = "if it was changed on purpose, hf_rnn.accept_checkpoint(folder) takes its files as they are"
STAGING = "_saving"  # the Hub's uploads of a run leave out names that begin so


class CheckpointError(OSError):
    """A checkpoint could not be written. Those before it are as they were."""


class AtomicCheckpoints(Trainer):
    """Trainer whose checkpoints are written aside, checked, and put in place under their name in one step.

    Files go to `_saving/checkpoint-N`; when every process has written its own, process 0 reads them back, writes
    `manifest.json` (size and SHA-256 of each), flushes all to the disk and renames the folder. A run that is killed
    meanwhile leaves the checkpoints before as they were; what it left in `_saving` is removed when training starts
    again, or, where all of it was written, put in place. Processes share a file system, or save for themselves
    (`save_on_each_node`).

    `train(resume_from_checkpoint=True)` takes the latest checkpoint whose files all are what was written, and warns of
    each that it passes by. A path must be whole, too; a checkpoint without a manifest, of another Trainer, is taken by
    its path alone. Optimizer, schedule and random state are never left out.
    """

    _saving = False

    # Saving

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        run = Path(self._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        staged = run / STAGING / final.name
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # for the files of other processes
            self._note_best(run, final)
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))
                check_readable(staged)
                write_manifest(staged, next_order(run), self.args.world_size, self._batch())
                flush(staged)
                put_in_place(staged, final)
                shutil.rmtree(run / STAGING, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(run / STAGING, ignore_errors=True)
            raise CheckpointError(_describe_failure(run, final, error)) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _note_best(self, run: Path, final: Path) -> None:
        """Where the best checkpoint lies, under the name that it has or is about to have."""
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _push_from_checkpoint(self, checkpoint_folder) -> None:
        if not self._saving:  # when it is in its place
            super()._push_from_checkpoint(checkpoint_folder)

    # Going on

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        run = Path(self.args.output_dir or ".")
        found: list = [None, None]
        if self.args.should_save:
            sweep(run)
        if self.is_world_process_zero():
            try:
                found[0] = self._find_checkpoint(run, resume_from_checkpoint)
                self._compare_batch(found[0])
            except (ValueError, OSError) as error:
                found[1] = str(error)
        path, error = broadcast_object_list(found)
        if error is not None:
            raise ValueError(error)
        return super().train(path, *args, **kwargs)

    def _find_checkpoint(self, run: Path, wanted: str | bool | None) -> str | None:
        """The folder to go on from.

        Raises:
            ValueError: there is none, or it is not whole.
        """
        if not wanted:
            return None
        if wanted is not True:
            self._check_whole(Path(wanted))
            return str(wanted)
        path, damages = newest_whole(run)
        for name, damage in damages.items():
            logger.warning(f"resume_from_checkpoint: skipped {run / name}: {damage}; {ON_PURPOSE}")
        if path is None:
            reasons = "".join(f"; {name}: {damage}" for name, damage in damages.items())
            hint = f". {ON_PURPOSE}" if reasons else ""
            raise ValueError(f"resume_from_checkpoint: {run} has no whole checkpoint{reasons}{hint}")
        return str(path)

    def _check_whole(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"resume_from_checkpoint: expected the folder of a checkpoint, got {folder}")
        damage = find_damage(folder)
        if damage == NO_MANIFEST:  # another Trainer's
            logger.warning(f"resume_from_checkpoint: {folder} has no manifest.json; its files are taken as they are")
            damage = None
        hint = f"; {ON_PURPOSE}" if damage else ""
        damage = damage or find_missing(folder)
        if damage is not None:
            raise ValueError(
                f"resume_from_checkpoint: {folder}: {damage}. resume_from_checkpoint=True takes the latest whole one "
                f"of output_dir; to start anew from weights alone, load them with from_pretrained{hint}"
            )

    def _batch(self) -> int:
        """Sequences of an optimizer step, over all processes."""
        return self.get_total_train_batch_size(self.args)

    def _compare_batch(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / "manifest.json").exists():
            return
        before, now = read_manifest(Path(checkpoint))["batch"], self._batch()
        if before not in (None, now):
            logger.warning(
                f"resume_from_checkpoint: {checkpoint} was trained with {before} sequences a step, this run has {now}: "
                "it skips by steps, so some data is seen twice in an epoch or not at all"
            )

    def _init_training_state(self, max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial):
        """Trainer's, and for a stream, whose epochs have a length that nobody knows, where in which epoch it stood."""
        at = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None or num_train_epochs != sys.maxsize or self.args.ignore_data_skip:
            return at
        saved = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
        epoch = saved.epoch or 0.0  # counted as if one had max_steps steps
        return int(epoch), round(epoch % 1 * saved.max_steps) * self.args.gradient_accumulation_steps

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if (damage := find_damage(best)) not in (None, NO_MANIFEST):
            raise CheckpointError(
                f"load_best_model_at_end: {best}: {damage}. The last checkpoint is what it was; {ON_PURPOSE}"
            )
        super()._load_best_model()

    def _run_epoch(self, *args, **kwargs) -> None:
        """Trainer's, which makes a step more where a run goes on that was at its last."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """Trainer's, which draws random numbers of those that training goes on with; so a run that is resumed between
        a step and an evaluation after it would be another."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def _load_rng_state(self, checkpoint) -> None:
        """As Trainer's; after a change of the number of processes, which random streams belong to, new ones."""
        args = self.args
        name = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
        before = 0 if checkpoint is None else len(list(Path(checkpoint).glob("rng_state*.pth")))
        if checkpoint is None or (before == args.world_size and (Path(checkpoint) / name).is_file()):
            super()._load_rng_state(checkpoint)
            return
        if before == args.world_size:
            raise ValueError(f"resume_from_checkpoint: {checkpoint}: {name} is missing")
        logger.warning(
            f"resume_from_checkpoint: {checkpoint} is of {before} processes, this run has {args.world_size}: random "
            "numbers, such as dropout's, are others from here on"
        )
        set_seed(random.Random(f"{args.seed} {self.state.global_step} {args.process_index}").getrandbits(32))


def put_in_place(staged: Path, final: Path) -> None:
    """Rename a folder, in the place of one that is there."""
    old = staged.with_name(f"replaced-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(staged, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    flush_one(final.parent)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` are left, but not the latest, nor the best.

    transformers' own goes by times of folders, or by steps: in a folder that another run has used, it could remove the
    one just saved.
    """
    if not limit or limit < 0:
        return
    found = [path for path in checkpoints(run) if order_of(path) < math.inf]  # the others are not this trainer's
    protected = {found[0], *([Path(best)] if best else [])}
    spare = [path for path in reversed(found) if path not in protected]
    for path in spare[: max(0, len(found) - max(limit, len(protected)))]:
        shutil.rmtree(path, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove what an interrupted save left in `_saving`; what was written to its end is put in place."""
    staging = run / STAGING
    if not staging.is_dir():
        return
    for staged in checkpoints(staging):
        if find_damage(staged) is None:
            logger.warning(f"{run / staged.name}: was whole when its save was interrupted, and is now in place")
            put_in_place(staged, run / staged.name)
    shutil.rmtree(staging, ignore_errors=True)


def _describe_failure(run: Path, final: Path, error: Exception) -> str:
    path, _ = newest_whole(run)
    free = shutil.disk_usage(run if run.is_dir() else ".").free
    last = f"{path} is whole, resume_from_checkpoint=True goes on from it" if path else "no checkpoint was saved before"
    return f"{final}: could not be saved ({error}); {free / 2**20:,.0f} MiB are free. Training has stopped; {last}"
