"""`hf-rnn compress CHECKPOINT FOLDER`: store the weights in few bits; `from_pretrained` loads the folder."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils.hub import cached_file

from hf_rnn.cli.data import read_documents, tokenize
from hf_rnn.cli.device import add_device, find_device
from hf_rnn.compression.checkpoint import save_compressed
from hf_rnn.compression.curvature import weight_curvature
from hf_rnn.hub.loading import load
from hf_rnn.tasks.evaluation import stream_loss
from hf_rnn.tokenization.reading import read_tokenizer
from hf_rnn_kernels.coding import CODERS


def _sequences(ids: torch.Tensor, length: int = 256) -> Iterator[dict[str, torch.Tensor]]:
    for part in ids.long().split(length):
        if len(part) > 1:
            yield {"input_ids": part[None], "labels": part[None]}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn compress", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or its name on the Hub")
    parser.add_argument("folder", type=Path, help="a new folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--step", type=float, help="quantisation step of all tensors, a power of two")
    how.add_argument("--max_error", type=float, help="largest relative error of each tensor; default: 0.05")
    how.add_argument("--data", help="a text file or dataset: choose the step of each row by the loss on it")
    parser.add_argument(
        "--max_loss_increase", type=float, default=0.005, help="with --data: allowed increase, as a share of the loss"
    )
    parser.add_argument(
        "--tokens", type=int, default=16384, help="with --data: how many of its tokens to use, at most a quarter"
    )
    parser.add_argument("--split", default="test", help="split of a dataset")
    parser.add_argument("--text_column", default="text")
    parser.add_argument(
        "--rate", type=float, default=0.1, help="without --data: error to accept for a saved bit, in squared steps"
    )
    parser.add_argument("--coder", choices=CODERS, default="trellis")
    parser.add_argument("--exclude", default=r"norm|bias", help="regular expression of the parameters not to quantise")
    parser.add_argument("--base", help="the checkpoint it was fine-tuned from: only the difference is coded")
    parser.add_argument("--max_shard_size", default="5GB", help="largest size of a weights file")
    add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise ValueError(f"folder: {arguments.folder} is not empty; choose a new one")
    device = find_device(arguments.device)
    model = load(arguments.checkpoint).to(device)  # type: ignore[arg-type]
    tokenizer = None
    if cached_file(arguments.checkpoint, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False):
        tokenizer = read_tokenizer(arguments.checkpoint)
    evaluate = curvature = None
    evaluations = 0
    if arguments.data is not None:
        if tokenizer is None:
            raise ValueError(f"data: {arguments.checkpoint} has no tokenizer to read it with")
        documents = read_documents(arguments.data, arguments.split, arguments.text_column)
        text = torch.from_numpy(tokenize(documents, tokenizer)[0])
        ids = text[: min(arguments.tokens, len(text) // 4)]
        if len(ids) < 2:
            raise ValueError(f"data, tokens: expected at least 8 tokens in the text and 2 of them, got {len(text)}")

        def evaluate() -> float:
            return stream_loss(model, ids) / (len(ids) - 1)

        print(f"loss before: {evaluate():.4f} nats a token")
        curvature = weight_curvature(model, _sequences(ids.to(device)), arguments.exclude)
        # In passes over these tokens an epoch over the text is three for each time that they fit in, and so is a
        # gradient: evaluations cost no more than what is left.
        evaluations = min(10, 3 * (len(text) - len(ids)) // len(ids))
    result = save_compressed(
        model,
        arguments.folder,
        max_shard_size=arguments.max_shard_size,
        step=arguments.step,
        max_error=arguments.max_error,
        evaluate=evaluate,
        max_loss_increase=arguments.max_loss_increase,
        rate=arguments.rate,
        coder=arguments.coder,
        exclude=arguments.exclude,
        base=arguments.base,
        curvature=curvature,
        evaluations=evaluations,
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(arguments.folder)
    if evaluate is not None:
        print(f"loss after: {evaluate():.4f} nats a token")
    print(result)
    print(f"saved {arguments.folder}; try: hf-rnn inspect {arguments.folder}")
