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
    learning_rate: float = field(default=3e-5, metadata={"help": "a tenth of SMT's"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "see TrainingArguments"})
    warmup_steps: float = field(default=0.05, metadata={"help": "a share of the steps, or their number"})
