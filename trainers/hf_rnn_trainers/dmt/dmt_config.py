from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_rnn_trainers.memory.memory_config import MemoryTrainingConfig


@dataclass
class DMTConfig(MemoryTrainingConfig):
    """TrainingArguments of `DMTTrainer`: the paper's coefficients and learning rate as defaults."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "dense": dict(readout_steps=8, coef_dynamics=0.0, learning_rate=1e-3, warmup_steps=0),
        "rare": dict(learning_rate=1e-3, label_every=1),
        "paper": dict(
            learning_rate=3e-5, context_size=256, label_every=16, per_device_train_batch_size=32, max_steps=1500
        ),
    }

    coef_dynamics: float = field(default=10.0, metadata={"help": "of the error of the memories rolled out"})
    detach_rollout: bool = field(
        default=True,
        metadata={"help": "each memory of a rollout is given to the next step; False: backpropagation through all"},
    )
    optimizer_from: str | None = field(
        default=None,
        metadata={
            "help": "a checkpoint of the smt run (checkpoint-N): what its optimizer knew of the student goes on, at "
            "this run's rate and schedule"
        },
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
