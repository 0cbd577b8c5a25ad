from dataclasses import dataclass, field

from transformers import TrainingArguments

BACKPROP = ("full", "chunked", "truncated")


@dataclass
class RecurrentTrainingArguments(TrainingArguments):
    """TrainingArguments with what the package's trainers add for all methods."""

    max_skipped_steps: int = field(
        default=0,
        metadata={
            "help": "steps with a loss or gradient that is not finite to skip, counted from the start of the run, "
            "before the next one stops it; 0: the first one stops it"
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "False: a loss that is not finite is logged as it is, not as 0.0"}
    )
    backprop: str = field(
        default="full",
        metadata={
            "help": "full: through whole rows, memory grows with their length; chunked: the same gradient piece by "
            "piece, with the memory of one piece and one more forward pass; truncated: the state is passed from piece "
            "to piece, the gradient is not"
        },
    )
    chunk_size: int | None = field(default=None, metadata={"help": "chunked, truncated: tokens of a piece"})
    chunk_states: int | None = field(
        default=None,
        metadata={
            "help": "chunked: how many states between pieces to keep at a time, for large states: the square root "
            "of the number of pieces costs about one more forward pass; default: all"
        },
    )
    gradient_chunks: int = field(
        default=1,
        metadata={
            "help": "truncated: how many pieces the gradient of a loss goes back through, its own included; each piece "
            "runs that many times"
        },
    )
    stream: bool = field(
        default=False,
        metadata={
            "help": "lay documents end to end in as many streams as a batch has rows; each batch continues where the "
            "last one ended, with its state"
        },
    )
    stream_length: int | None = field(
        default=None, metadata={"help": "stream: tokens in each row of a batch; default: 512"}
    )
    reset_at_documents: bool = field(
        default=True,
        metadata={"help": "stream: each document starts from the initial state; False: where the last one ended"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps: expected at least 0, got {self.max_skipped_steps}")
        if self.backprop not in BACKPROP:
            raise ValueError(f"backprop: expected one of {', '.join(BACKPROP)}, got {self.backprop!r}")
        self._check_pieces()
        if self.gradient_checkpointing and (self.stream or self.backprop != "full"):
            raise ValueError("gradient_checkpointing: it drops the state that pieces and streams hand on; leave it out")
        if not self.stream:
            for name, default in dict(stream_length=None, reset_at_documents=True).items():
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: only with stream=True")
            return
        if self.stream_length is not None and self.stream_length < 1:
            raise ValueError(f"stream_length: expected at least 1 token, got {self.stream_length}")
        for name, expected in dict(
            auto_find_batch_size=False, ignore_data_skip=False, dataloader_drop_last=False
        ).items():
            if getattr(self, name) != expected:
                raise ValueError(f"{name}: a stream goes on where it stood, in as many rows as before; leave it out")
        if self.train_sampling_strategy != "random":
            raise ValueError(f"train_sampling_strategy: a stream has one order, got {self.train_sampling_strategy!r}")
        if self.accelerator_config.split_batches:  # type: ignore[union-attr]
            raise ValueError("accelerator_config: split_batches would give each process others' rows; leave it out")
        # Each process reads for itself: where one reads for all, random states are others on resuming
        self.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]

    def _check_pieces(self) -> None:
        if self.backprop == "full":
            for name, default in dict(chunk_size=None, chunk_states=None, gradient_chunks=1).items():
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: backprop='full' has no pieces; choose 'chunked' or 'truncated'")
            return
        if self.chunk_size is None or self.chunk_size < 1:
            raise ValueError(f"chunk_size: backprop={self.backprop!r} expects at least 1 token, got {self.chunk_size}")
        if self.chunk_states is not None and (self.backprop != "chunked" or self.chunk_states < 2):
            raise ValueError(f"chunk_states: expected at least 2, with backprop='chunked', got {self.chunk_states}")
        if self.gradient_chunks < 1 or (self.backprop != "truncated" and self.gradient_chunks != 1):
            raise ValueError(
                f"gradient_chunks: expected at least 1, with backprop='truncated', got {self.gradient_chunks}"
            )
