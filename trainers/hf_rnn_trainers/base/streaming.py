"""Training and evaluation on streams: data that go on from batch to batch, and the state that goes with them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.utils import logging

from hf_rnn_trainers.base.pieces import BackpropOverPieces, State
from hf_rnn_trainers.base.streams import as_streams

logger = logging.get_logger(__name__)

NAME = "stream_state_{}.safetensors"  # of each process
LENGTH = 512  # tokens of a window where none are said


class StreamingTrainer(BackpropOverPieces):
    """Trainer that, with `stream=True`, reads its data sets as streams (`streams.Streams`, `OpenStreams`): row r of a
    batch goes on where row r of the one before ended, with its state, over accumulated batches and optimizer steps
    alike. An epoch starts from the initial state.

    The state is part of each checkpoint, so that a run goes on in the middle of a document bit for bit. It belongs to
    rows: with another number of processes and as many rows in all, each goes on with its own; with more or fewer, none
    could. Evaluation reads its own streams from their start, and measures the mean over all tokens.
    """

    _windows = _all_windows = 0  # read since the epoch began, and in all of it
    _evaluating: tuple[State, Tensor] | None = None  # a stream: the state, and nats and targets so far

    def check_pieces(self) -> None:
        super().check_pieces()
        if not self.streams:
            return
        if self.in_pieces and self.args.chunk_size > self.length:
            raise ValueError(
                f"chunk_size: expected at most stream_length={self.length} tokens, got {self.args.chunk_size}"
            )
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: a stream's logits are as many as its tokens, and none are kept; leave it out"
                )
        own = self.data_collator is not default_data_collator
        if own and not isinstance(self.data_collator, DataCollatorWithPadding):  # Trainer's
            raise ValueError("data_collator: a stream's windows are all of one length; leave it out")

    @property
    def length(self) -> int:
        """Tokens of each row of a batch."""
        return self.args.stream_length or LENGTH

    def get_train_dataloader(self) -> DataLoader:
        return (
            self._loader(self.train_dataset, self._train_batch_size) if self.streams else super().get_train_dataloader()
        )

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        if not self.streams:
            return super().get_eval_dataloader(eval_dataset)
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset  # type: ignore[index, call-overload]
        return self._loader(dataset, self.args.eval_batch_size)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        if self.streams:
            raise ValueError(
                "predict: a stream's logits are as many as its tokens; evaluate() measures, and keeps none"
            )
        return super().get_test_dataloader(test_dataset)

    def _loader(self, dataset: Any, batch_size: int) -> DataLoader:
        args = self.args
        streams = as_streams(dataset, batch_size * args.world_size, self.length, args.reset_at_documents)
        loader: DataLoader = DataLoader(
            streams,
            batch_size=batch_size,
            collate_fn=default_data_collator,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._windows += 1
        return loss

    def _run_epoch(self, **about) -> None:
        checkpoint = about["resume_from_checkpoint"]
        self.carried, self._windows, self._all_windows = None, 0, about["steps_in_epoch"]
        if checkpoint is not None and about["epoch"] == about["epochs_trained"]:
            self._windows = about["steps_trained_in_current_epoch"]
            self._restore(Path(checkpoint))
        super()._run_epoch(**about)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self.carried is None:
            return
        state, args = self.carried, self.args
        tensors = {
            f"{layer}.{number}": x.contiguous()
            for layer, tensors in enumerate(state.states)
            for number, x in enumerate(tensors)
        }
        about = dict(windows=self._windows, length=self.length, reset=args.reset_at_documents)
        about["ended"] = self._windows == self._all_windows
        path = Path(output_dir) / NAME.format(args.process_index)
        save_file(tensors, path, {name: str(int(x)) for name, x in about.items()})

    def _restore(self, checkpoint: Path) -> None:
        """The state of this process's rows.

        Raises:
            ValueError: there is none, or one of other rows or at another place.
        """
        count = len(list(checkpoint.glob(NAME.format("*"))))
        if not self.streams:
            if count:
                raise ValueError(f"resume_from_checkpoint: {checkpoint} is of streams; expected stream=True, as before")
            return
        if count == 0:
            raise ValueError(f"resume_from_checkpoint: {checkpoint} has no state of a stream; it was trained without")
        files = [checkpoint / NAME.format(i) for i in range(count)]
        parts: list[dict[str, Tensor]] = []
        for path in files:
            with safe_open(path, "pt") as file:
                about = {name: int(x) for name, x in file.metadata().items()}
                parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        if about["ended"] and self._windows == 0:
            return  # at the start of an epoch
        args, rows = self.args, self._train_batch_size
        there = sum(part["0.0"].shape[0] for part in parts)
        now = dict(rows=rows * args.world_size, stream_length=self.length, batches=self._windows)
        now["reset_at_documents"] = int(args.reset_at_documents)
        before = dict(rows=there, stream_length=about["length"], batches=about["windows"])
        before["reset_at_documents"] = about["reset"]
        for name, x in before.items():
            if now[name] != x:
                raise ValueError(
                    f"resume_from_checkpoint: {checkpoint} stands at {before} of its streams, this run at {now}: the "
                    f"{name} would not go on where they were; choose batch size, processes, accumulation, "
                    "stream_length and reset_at_documents as before"
                )
        if count != args.world_size:
            logger.warning(f"resume_from_checkpoint: the states of {count} processes' rows go on in {args.world_size}")
        mine = slice(args.process_index * rows, (args.process_index + 1) * rows)
        whole = {name: torch.cat([part[name] for part in parts])[mine].to(args.device) for name in parts[0]}
        self.carried = self.accelerator.unwrap_model(self.model).new_cache()
        self.carried.states = [
            tuple(whole[name] for name in sorted(whole, key=_place) if _place(name)[0] == layer)
            for layer in range(len(self.carried.states))
        ]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer's; where only the loss is wanted, of streams and over pieces at the memory of one."""
        streams = self._evaluating is not None
        if not (streams or (self.in_pieces and prediction_loss_only)):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        state = self._evaluating[0] if self._evaluating else self.accelerator.unwrap_model(self.model).new_cache()
        nats, count = self.measure(model, inputs, state)
        if self._evaluating is not None:
            self._evaluating[1].add_(torch.stack([nats, count.double()]))
        return (nats / count.clamp(min=1)).float(), None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        options = dict(metric_key_prefix=metric_key_prefix, **kwargs)
        if not self.streams:
            return super().evaluation_loop(dataloader, description, *args, **options)
        state = self.accelerator.unwrap_model(self.model).new_cache()
        self._evaluating = state, torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(dataloader, description, *args, **options)
            nats, count = self.accelerator.reduce(self._evaluating[1]).tolist()
        finally:
            self._evaluating = None
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = nats / count if count else float("nan")
        return output


def _place(name: str) -> tuple[int, int]:
    layer, number = name.split(".")
    return int(layer), int(number)
