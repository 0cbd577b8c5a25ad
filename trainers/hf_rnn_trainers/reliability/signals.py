"""A run that is told to end saves a checkpoint first."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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
    _saved_at: int | None = None

    def train(self, *args, **kwargs):
        with self._signals_noted():
            return super().train(*args, **kwargs)

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        self._signal = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if not self._signal:
            self._signal = number
            # Not print: a signal may come while something is being printed
            os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint at the end of this step\n".encode())

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self._saved_at = self.state.global_step

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        number = self._received()
        if not number:
            return
        if self._saved_at != self.state.global_step:
            self._save_checkpoint(model, trial)
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
