"""A run that is told to end saves a checkpoint first."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from accelerate.utils import gather
from transformers import Trainer
from transformers.utils import logging

logger = logging.get_logger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SaveOnSignal(Trainer):
    """Trainer that after SIGTERM or SIGINT makes the step to its end, saves, and exits with 128 + the signal's number.

    An evaluation that is due at that step comes first, so that the resumed run is the same as one without a signal.
    Further signals change nothing. With several processes all save and exit after the same step, whichever got the
    signal. Handlers stand during `train` in the main thread; those before come back after it.
    """

    _signal = 0
    _saved_at: tuple[int, int] | None = None
    _looked_at: int | None = None

    def train(self, *args, **kwargs):
        with self._signals_noted():
            output = super().train(*args, **kwargs)
        if self._signal:  # while the run was being ended
            raise SystemExit(128 + self._signal)
        return output

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        self._signal, self._saved_at, self._looked_at = 0, None, None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        before[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if not self._signal:
            self._signal = number
            # With it torch would raise an error in the middle of anything, the loaders' workers having got the signal
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Not print: a signal may come while something is being printed
            os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint at the end of this step\n".encode())

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self._saved_at = self._now()

    def _now(self) -> tuple[int, int]:
        """The step, and what was logged: an evaluation changes what a checkpoint holds."""
        return self.state.global_step, len(self.state.log_history)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        first, self._looked_at = self._looked_at != self.state.global_step, self.state.global_step
        number = self._received()
        # After the last step of an epoch comes another call, for what is due at its end
        if number and not (first and (self.state.epoch or 0.5) % 1 == 0):
            self._save_and_exit(number, model, trial)

    def _finalize_training(self, trial, *args, **kwargs):
        if number := self._received():
            self._save_and_exit(number, self.model_wrapped, trial)
        return super()._finalize_training(trial, *args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        """Trainer's. Where its workers got the signal as well, and are gone, the last step is the one to save."""
        try:
            return super().get_batch_samples(*args, **kwargs)
        except RuntimeError:
            if not self._signal or self.args.world_size > 1:  # processes would not be at the same step
                raise
            self._save_and_exit(self._signal, self.model_wrapped, None)

    def _save_and_exit(self, number: int, model, trial) -> NoReturn:
        if self._saved_at != self._now() or self.args.save_only_model:
            asked, self.args.save_only_model = self.args.save_only_model, False  # the run is to go on from here
            self._save_checkpoint(model, trial)
            self.args.save_only_model = asked
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self._finish_current_push()
        logger.warning(
            f"{signal.Signals(number).name}: stopped after step {self.state.global_step}, which is saved; "
            "resume_from_checkpoint=True goes on from there"
        )
        raise SystemExit(128 + number)

    def _received(self) -> int:
        """The signal that any process got."""
        if self.args.world_size == 1:
            return self._signal
        return int(gather(torch.tensor([self._signal], device=self.args.device)).max())
