from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class RecurrentTrainingArguments(TrainingArguments):
    """TrainingArguments with what the package's trainers add for all methods."""

    max_skipped_steps: int = field(
        default=0,
        metadata={
            "help": "steps that are left out since the run was started, their loss or gradient not being finite, "
            "before one stops it; 0: the first does"
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "False: a loss that is not finite is logged as such, never as 0.0"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps: expected at least 0, got {self.max_skipped_steps}")
