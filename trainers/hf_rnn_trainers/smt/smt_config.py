from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_rnn_trainers.memory.memory_config import MemoryTrainingConfig


@dataclass
class SMTConfig(MemoryTrainingConfig):
    """TrainingArguments of `SMTTrainer`: the paper's coefficients, learning rate and windows as defaults."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "dense": dict(
            all_positions=True,
            student_steps=8,
            coef_student=1.0,
            coef_first=1.0,
            coef_decoder=0.0,
            coef_dynamics=0.02,
            teacher_decoder_layers=0,
            teacher_conv_kernel=4,
            learning_rate=2e-3,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs=dict(min_lr_rate=0.5),
            warmup_steps=0.1,
        ),
        "rare": dict(
            all_positions=True,
            labelled_share=0.5,
            positions_per_sequence=2,
            learning_rate=2e-3,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs=dict(min_lr_rate=0.1),
            warmup_steps=0.1,
        ),
        "paper": dict(
            learning_rate=3e-4,
            context_size=256,
            future_size=64,
            teacher_hidden_size=256,
            teacher_encoder_layers=8,
            teacher_decoder_layers=4,
            teacher_heads=8,
            per_device_train_batch_size=128,
            max_steps=150_000,
        ),
    }

    future_size: int = field(default=64, metadata={"help": "targets that a memory has to predict, the next one first"})
    coef_decoder: float = field(default=1.0, metadata={"help": "of the future's cross-entropy"})
    coef_dynamics: float = field(default=0.1, metadata={"help": "of the one-step error of the memory"})
    coef_uniformity: float = field(default=0.001, metadata={"help": "of what spreads memories over the sphere"})
    student_steps: int = field(
        default=1,
        metadata={
            "help": "steps that the student makes from each of the teacher's memories, with a gradient through them; "
            "1: the paper's"
        },
    )
    coef_student: float = field(
        default=0.0,
        metadata={"help": "of the readout's cross-entropy on the student's own memories after these steps; 0: paper's"},
    )
    coef_first: float = field(
        default=0.0,
        metadata={
            "help": "of the gradient that the readout of the teacher's memories gives the encoder, times coef_readout; "
            "0, the paper's: it stops at the memory it reads"
        },
    )
    detach_labels: bool = field(
        default=False, metadata={"help": "the student's error does not reach the teacher, whose memories then need not "
                                 "be such as a recurrent network can follow"},
    )  # fmt: skip
    all_positions: bool = field(
        default=False,
        metadata={"help": "a new teacher is causal and gives all memories of a sequence at once, all of which train"},
    )
    positions_per_sequence: int = field(
        default=1, metadata={"help": "memories of each sequence that have to predict its future"}
    )
    first_share: float = field(
        default=0.0,
        metadata={"help": "share of memories at the first token beyond its turn, to learn to start from the empty one"},
    )
    labelled_share: float = field(
        default=0.0, metadata={"help": "share of memories at positions with something to predict, where these are few"}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "of both networks"})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "see TrainingArguments"})
    warmup_steps: float = field(default=0.01, metadata={"help": "a share of the steps, or their number"})

    def __post_init__(self):
        super().__post_init__()
        for name in ("future_size", "positions_per_sequence", "student_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if min(self.first_share, self.labelled_share) < 0 or self.first_share + self.labelled_share > 1:
            raise ValueError(
                "first_share, labelled_share: expected shares in [0, 1] that sum to at most 1, got "
                f"{self.first_share} and {self.labelled_share}"
            )
