from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from hf_rnn_trainers.base import RecurrentTrainingArguments


@dataclass
class MemoryTrainingConfig(RecurrentTrainingArguments):
    """TrainingArguments of what trains a student by a teacher's memories.

    What differs from their defaults are the paper's optimizer: AdamW with betas (0.9, 0.95), weight decay 0.01.

    Attributes:
        presets: settings by name, for `preset`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    context_size: int = field(
        default=256,
        metadata={"help": "tokens that the teacher remembers; labels forget what left them, and the student learns so"},
    )
    label_every: int = field(
        default=16, metadata={"help": "steps of a rollout between two labels by the teacher, in DMT and for the drift"}
    )
    teacher_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "width of a new teacher; default: its layers have as many parameters as the student, and it is as "
            "wide as a memory token"
        },
    )
    teacher_encoder_layers: int = field(default=2, metadata={"help": "of a new teacher; the paper's has 8"})
    teacher_decoder_layers: int = field(
        default=2, metadata={"help": "of a new teacher; the paper's has 4; 0: no decoder, with coef_decoder=0"}
    )
    teacher_heads: int = field(default=4, metadata={"help": "of a new teacher"})
    teacher_queries: bool | None = field(
        default=None,
        metadata={
            "help": "with all_positions each memory token of a new teacher looks back for itself; default: where the "
            "teacher is narrower than the memory"
        },
    )
    teacher_conv_kernel: int = field(
        default=0, metadata={"help": "taps of a causal convolution over a new teacher's embeddings; 0: none"}
    )
    teacher_timestamps: bool = field(
        default=False, metadata={"help": "a new teacher's encoder has learned positions, context_size of them"}
    )
    coef_readout: float = field(
        default=1.0, metadata={"help": "of the readout's cross-entropy, which stops at the memory it reads"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "see TrainingArguments"})
    adam_beta2: float = field(default=0.95, metadata={"help": "see TrainingArguments"})

    @classmethod
    def preset(cls, name: str, output_dir: str, **others: Any) -> Self:
        """Settings by what is to be learned; docs/memory_training.md says which of them is for what.

        Args:
            name: "dense" (every token has a label: text, pixels), "rare" (few labels, far from what they depend on), or
                "paper" (its sizes, for a student of its size).
            others: settings besides, or instead.

        Raises:
            ValueError: a name that is none.
        """
        return cls(output_dir=output_dir, **cls.preset_settings(name) | others)

    @classmethod
    def preset_settings(cls, name: str) -> dict[str, Any]:
        if name not in cls.presets:
            raise ValueError(f"preset: expected one of {', '.join(cls.presets)}, got {name!r}")
        return dict(cls.presets[name])

    def __post_init__(self):
        super().__post_init__()
        for name in ("context_size", "label_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in [name for name in vars(self) if name.startswith("coef_")]:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: this loss has none; leave it 0")
        if self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing: the student is trained by single steps; leave it off")
        if self.deepspeed is not None or self.fsdp:
            raise ValueError("deepspeed, fsdp: two networks train together; use plain processes")
