from dataclasses import dataclass, field

from hf_rnn_trainers.memory.memory_config import MemoryTrainingConfig


@dataclass
class DMTConfig(MemoryTrainingConfig):
    """TrainingArguments of `DMTTrainer`: the paper's coefficients and learning rate as defaults."""

    coef_dynamics: float = field(default=10.0, metadata={"help": "of the error of the memories rolled out"})
    detach_rollout: bool = field(
        default=True,
        metadata={"help": "each memory of a rollout is given to the next step; False: backpropagation through all"},
    )
    readout_steps: int = field(
        default=0,
        metadata={
            "help": "calls of the student that the readout's error goes back through, from memories of a rollout "
            "without a gradient; 0, the paper's: it stops at the memory it reads"
        },
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "a tenth of SMT's"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "see TrainingArguments"})
    warmup_steps: float = field(default=0.05, metadata={"help": "a share of the steps, or their number"})

    def __post_init__(self):
        super().__post_init__()
        if self.readout_steps < 0:
            raise ValueError(f"readout_steps: expected at least 0, got {self.readout_steps}")
