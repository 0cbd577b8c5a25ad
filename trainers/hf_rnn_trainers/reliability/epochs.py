"""Epochs whose order of data is the same when a run goes on in the middle of one."""

import random
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

logger = logging.get_logger(__name__)


class RepeatableEpochs(Trainer):
    """Trainer whose checkpoints keep the random state that their epoch began with, beside the one they were saved with.

    transformers shuffles by a seed and the number of the epoch, but groups by length, as samplers of one's own may do,
    by the numbers that come next: a resumed run would draw others, and skip other batches than those it trained on.
    With persistent workers an epoch draws as many numbers as without them, whether the workers are new or not.
    """

    _epoch_start: dict | None = None

    def _run_epoch(
        self,
        *,
        epoch: int,
        train_dataloader: DataLoader,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
        **kwargs,
    ) -> None:
        if resume_from_checkpoint is not None and epoch == epochs_trained:
            if steps_trained_in_current_epoch:
                self._go_back_to_start(Path(resume_from_checkpoint))
            else:  # Trainer would do it after the state was noted
                self._load_rng_state(resume_from_checkpoint)
                resume_from_checkpoint = None
        self._epoch_start = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        if getattr(train_dataloader, "_iterator", None) is not None:  # of persistent workers, which have their seed
            torch.empty((), dtype=torch.int64).random_()
        super()._run_epoch(
            epoch=epoch,
            train_dataloader=train_dataloader,
            resume_from_checkpoint=resume_from_checkpoint,
            epochs_trained=epochs_trained,
            steps_trained_in_current_epoch=steps_trained_in_current_epoch,
            **kwargs,
        )

    def _go_back_to_start(self, checkpoint: Path) -> None:
        if not self._epoch_file(checkpoint).is_file():  # another Trainer's, or of another number of processes
            if self.args.train_sampling_strategy == "group_by_length":
                logger.warning(
                    f"resume_from_checkpoint: {checkpoint} does not have {self._epoch_file(checkpoint).name}: the rest "
                    "of this epoch is grouped otherwise, so some data is seen twice in it or not at all"
                )
            return
        with safe_globals():
            states = torch.load(self._epoch_file(checkpoint), weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["cpu"])

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._epoch_start is not None:
            torch.save(self._epoch_start, self._epoch_file(Path(output_dir)))

    def _epoch_file(self, checkpoint: Path) -> Path:
        index = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return checkpoint / f"epoch_rng_state{index}.pth"
