from dataclasses import dataclass, field

from transformers import TrainingArguments

BACKPROP = ("full", "chunked", "truncated")


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
    backprop: str = field(
        default="full",
        metadata={
            "help": "full: through whole rows, at a memory that grows with them; chunked: the same gradient, piece by "
            "piece, at the memory of one piece and one more forward pass; truncated: the state crosses from piece to "
            "piece, the gradient does not"
        },
    )
    chunk_size: int | None = field(default=None, metadata={"help": "tokens of a piece"})
    chunk_states: int | None = field(
        default=None,
        metadata={
            "help": "chunked: states between pieces that are kept at once, for large states: about the square root of "
            "the number of pieces costs one more forward pass; default: all of them"
        },
    )
    gradient_chunks: int = field(
        default=1,
        metadata={
            "help": "truncated: pieces that a loss's gradient reaches back through, its own included; each is run so "
            "many times"
        },
    )
    stream: bool = field(
        default=False,
        metadata={
            "help": "documents follow each other in as many streams as a batch has rows, and a batch goes on where the "
            "one before ended, with its state"
        },
    )
    stream_length: int = field(default=512, metadata={"help": "stream: tokens of each row of a batch"})
    reset_at_documents: bool = field(
        default=True,
        metadata={"help": "stream: each document starts from the initial state; False: from the last one's"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps: expected at least 0, got {self.max_skipped_steps}")
        if self.backprop not in BACKPROP:
            raise ValueError(f"backprop: expected one of {', '.join(BACKPROP)}, got {self.backprop!r}")
        self._check_pieces()
        if self.stream_length < 1:
            raise ValueError(f"stream_length: expected at least 1 token, got {self.stream_length}")
        if self.stream:  # each process reads for itself: where one reads for all, random states are others on resuming
            self.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        if self.stream and self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size: a stream's rows are its batch's, and cannot become fewer in a run")

    def _check_pieces(self) -> None:
        if self.backprop == "full":
            for name, default in dict(chunk_size=None, chunk_states=None, gradient_chunks=1).items():
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: backprop='full' has no pieces; choose 'chunked' or 'truncated'")
            return
        if self.chunk_size is None or self.chunk_size < 1:
            raise ValueError(f"chunk_size: backprop={self.backprop!r} expects at least 1 token, got {self.chunk_size}")
        if self.stream and self.chunk_size > self.stream_length:
            raise ValueError(
                f"chunk_size: expected at most stream_length={self.stream_length} tokens, got {self.chunk_size}"
            )
        if self.chunk_states is not None and (self.backprop != "chunked" or self.chunk_states < 2):
            raise ValueError(f"chunk_states: expected at least 2, with backprop='chunked', got {self.chunk_states}")
        if self.gradient_chunks < 1 or (self.backprop != "truncated" and self.gradient_chunks != 1):
            raise ValueError(
                f"gradient_chunks: expected at least 1, with backprop='truncated', got {self.gradient_chunks}"
            )
        if self.gradient_checkpointing:
            raise ValueError(
                f"gradient_checkpointing: backprop={self.backprop!r} computes pieces anew by itself; leave it out"
            )
