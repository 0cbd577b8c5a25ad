"""`hf-rnn compress CHECKPOINT FOLDER`: quantise and code the weights; `from_pretrained` reads the folder."""

import argparse
from pathlib import Path

import torch
from transformers.utils.hub import cached_file

from hf_rnn.cli.data import read_documents, tokenize
from hf_rnn.cli.device import add_device, find_device
from hf_rnn.compression.checkpoint import save_compressed
from hf_rnn.hub.loading import load
from hf_rnn.tasks.evaluation import stream_loss
from hf_rnn.tokenization.reading import read_tokenizer
from hf_rnn_kernels.coding import CODERS


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn compress", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or its name on the Hub")
    parser.add_argument("folder", type=Path, help="a new folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--step", type=float, help="quantisation step of all tensors, a power of two")
    how.add_argument("--max_error", type=float, help="of each tensor, relative; default: 0.05")
    how.add_argument("--data", help="a text by whose loss the step of each tensor is chosen: a file or dataset")
    parser.add_argument("--max_loss_increase", type=float, default=0.005, help="with data, as a share of the loss")
    parser.add_argument("--tokens", type=int, default=16384, help="with data, how many of its tokens to read")
    parser.add_argument("--split", default="test", help="split of a dataset")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--rate", type=float, default=0.1, help="squared steps of error that a bit is worth")
    parser.add_argument("--coder", choices=CODERS, default="ans")
    parser.add_argument("--exclude", default=r"norm|bias", help="regular expression of parameters to leave alone")
    parser.add_argument("--base", help="the checkpoint it was fine-tuned from: only the difference is coded")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file with weights")
    add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise ValueError(f"folder: {arguments.folder} is not empty; choose a new one")
    device = find_device(arguments.device)
    model = load(arguments.checkpoint).to(device)  # type: ignore[arg-type]
    tokenizer = None
    if cached_file(arguments.checkpoint, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False):
        tokenizer = read_tokenizer(arguments.checkpoint)
    evaluate = None
    if arguments.data is not None:
        if tokenizer is None:
            raise ValueError(f"data: {arguments.checkpoint} has no tokenizer to read it with")
        documents = read_documents(arguments.data, arguments.split, arguments.text_column)
        ids = torch.from_numpy(tokenize(documents, tokenizer)[0][: arguments.tokens])

        def evaluate() -> float:
            return stream_loss(model, ids) / (len(ids) - 1)

        print(f"loss before: {evaluate():.4f} nats a token")
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
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(arguments.folder)
    if evaluate is not None:
        print(f"loss after: {evaluate():.4f} nats a token")
    print(result)
    print(f"saved {arguments.folder}; try: hf-rnn inspect {arguments.folder}")
