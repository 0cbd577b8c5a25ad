"""A run that is told to end saves a checkpoint first."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
from accelerate.utils import gather
from transformers import Trainer
from transformers.utils import logging

logger = logging.get_logger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
CHILD_ENDED: signal.Signals | None = getattr(signal, "SIGCHLD", None)  # Windows has none
_AT_ONCE = "SIGQUIT (Ctrl-\\)" if hasattr(signal, "SIGQUIT") else "Ctrl-Break"


class SaveOnSignal(Trainer):
    """Trainer that after SIGTERM or SIGINT makes the step to its end, saves, and exits with 128 + the signal's number.

    An evaluation that is due at that step comes first, so that the resumed run is the same as one without a signal.
    Further signals change nothing, and are told so. With several processes all save and exit after the same step,
    whichever got the signal. Handlers stand during `train` in the main thread; those before come back after it. In an
    interactive session, which is not to be ended, SIGINT raises KeyboardInterrupt where it would exit.
    """

    _signal = 0
    _saved_at: tuple[int, int] | None = None
    _looked_at: int | None = None

    def train(self, *args, **kwargs):
        with self._signals_noted():
            output = super().train(*args, **kwargs)
        if self._signal:  # while the run was being ended
            _exit(self._signal)
        return output

    def _inner_training_loop(self, *args, **kwargs):
        """Trainer's, which begins again with a smaller batch where one was too large (`auto_find_batch_size`)."""
        self._saved_at = self._looked_at = None
        return super()._inner_training_loop(*args, **kwargs)

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        self._signal = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if CHILD_ENDED:
            before[CHILD_ENDED] = signal.getsignal(CHILD_ENDED)
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # else one that Python did not set and cannot set again
                    signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if self._signal:
            _tell(f"{name}: the checkpoint at the end of this step is still to come; {_AT_ONCE} stops without it")
            return
        self._signal = number
        if CHILD_ENDED:
            # With it torch would raise an error in the middle of anything, the loaders' workers having got the signal
            signal.signal(CHILD_ENDED, signal.SIG_DFL)
        _tell(f"{name}: saving a checkpoint at the end of this step")

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
        _exit(number)

    def _received(self) -> int:
        """The signal that any process got."""
        if self.args.world_size == 1:
            return self._signal
        return int(gather(torch.tensor([self._signal], device=self.args.device)).max())


def _tell(message: str) -> None:
    """Not by print: a signal may come while something is being printed."""
    with suppress(OSError):  # nobody may be there to read it
        os.write(2, f"\n{message}\n".encode())


def _exit(number: int) -> NoReturn:
    if number == signal.SIGINT and hasattr(sys, "ps1"):  # a notebook, or Python's own prompt
        raise KeyboardInterrupt("the run is saved")
    raise SystemExit(128 + number)
