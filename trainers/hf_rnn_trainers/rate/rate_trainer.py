"""Training under a constraint on the bits of the weights."""

from typing import Any

from hf_rnn_trainers.base import RecurrentTrainer
from hf_rnn_trainers.rate.rate_callback import RateCallback, settings_of
from hf_rnn_trainers.rate.rate_config import RateConstrainedConfig, RateSettings


class RateConstrainedTrainer(RecurrentTrainer):
    """transformers' Trainer, whose weights are pulled towards what costs few bits (`RateCallback` says how).

    Minimises D + lambda R, the loss and the weights' bits under a generalised Gaussian (BackSlash, arXiv 2504.16968).
    With `rate_shrink=0` it is the stock Trainer bit for bit. At the end of training `rate.png` in the output folder
    shows bits and loss over the run and the weights' histograms beside the fitted densities.

    Args:
        args: a `RateConstrainedConfig`.
        others: Trainer's; the model may be any of transformers', or one with adapters of PEFT.
    """

    card_papers = ("wu2025backslash",)
    config_class = RateConstrainedConfig

    def card_method(self) -> str:
        return "backpropagation through time with a rate term (weights pulled towards what costs few bits; `rate.png`)"

    def __init__(self, model: Any = None, args: RateConstrainedConfig | None = None, callbacks=None, **options: Any):
        # Before those that may raise, so that quantised weights are put back first
        super().__init__(model, args, callbacks=[RateCallback(), *(callbacks or [])], **options)
        self._settle()

    def _settle(self) -> None:
        """Give the callback its settings, which a search for hyper-parameters changes from run to run."""
        self.rate.settings = RateSettings(**settings_of(self.args))

    def _inner_training_loop(self, *args, **kwargs):
        self._settle()
        return super()._inner_training_loop(*args, **kwargs)

    def check_sharding(self) -> None:
        super().check_sharding()
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed: keeps weights of its own, which the rate step would not reach; use fsdp")

    @property
    def rate(self) -> RateCallback:
        """The callback; resuming with `restore_callback_states_from_checkpoint` puts another in its place."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, RateCallback))

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        except BaseException:
            self.rate.restore()
            raise

    def leave_out(self) -> None:
        super().leave_out()
        self.rate.rest()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.rate._parameters:
            logs = logs | self.rate.metrics()
        super().log(logs, start_time)
