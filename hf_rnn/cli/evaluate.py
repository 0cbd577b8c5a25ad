"""`hf-rnn eval CHECKPOINT --data ...`: measure bits per byte on a text, read as one stream at constant memory."""

import argparse
import math

import torch
from transformers import AutoModelForCausalLM

from hf_rnn.checkpoints import find_checkpoint
from hf_rnn.cli.data import read_documents, tokenize
from hf_rnn.cli.device import add_device, find_device
from hf_rnn.cli.plot import check_picture, plot_positions
from hf_rnn.tasks.dynamic_evaluation import dynamic_loss
from hf_rnn.tasks.evaluation import bits_per_byte, loss_by_position
from hf_rnn.tokenization.reading import read_tokenizer


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn eval", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, its name on the Hub, or of hf_rnn.pretrained()")
    parser.add_argument("--data", required=True, help="a text file, a folder saved by `datasets`, or a Hub dataset")
    parser.add_argument("--split", default="test", help="split of a dataset")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a forward pass")
    parser.add_argument(
        "--dynamic", action="store_true", help="also measure dynamic evaluation: the model learns from what it has read"
    )
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="with --dynamic: learning rate of a step")
    parser.add_argument("--segment", type=int, default=32, help="with --dynamic: tokens between two steps")
    parser.add_argument(
        "--positions", metavar="PICTURE", help="also plot the loss over the distance from the start, as a PNG"
    )
    parser.add_argument(
        "--rows", type=int, default=16, help="with --positions: number of parts of the text, each read from its start"
    )
    parser.add_argument("--trained", type=int, help="with --positions: the training sequence length, drawn as a line")
    add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.positions is None and (arguments.rows, arguments.trained) != (16, None):
        raise ValueError("rows, trained: only with --positions")
    if not arguments.dynamic and (arguments.learning_rate, arguments.segment) != (3e-4, 32):
        raise ValueError("learning_rate, segment: only with --dynamic")
    if arguments.positions is not None:
        check_picture(arguments.positions)
    device = find_device(arguments.device)
    checkpoint = find_checkpoint(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).to(device)  # type: ignore[arg-type]
    tokenizer = read_tokenizer(checkpoint)
    documents = read_documents(arguments.data, arguments.split, arguments.text_column)
    ids, ends = tokenize(documents, tokenizer)
    if len(ids) < 2:
        raise ValueError(f"data: expected at least 2 tokens, got {len(ids)}")
    stream, num_bytes = torch.from_numpy(ids), int(ends[-1] - ends[0])
    bits = bits_per_byte(model, stream, num_bytes, chunk=arguments.chunk, progress=True)
    print(f"bits per byte: {bits:.3f} over {num_bytes:,} bytes ({len(stream):,} tokens)")
    if arguments.dynamic:
        nats = dynamic_loss(model, stream, arguments.learning_rate, arguments.segment, progress=True)
        print(f"bits per byte, dynamic evaluation: {nats / math.log(2) / num_bytes:.3f}")
    if arguments.positions:
        chunk = max(1, arguments.chunk // arguments.rows)  # as many tokens a pass
        losses = loss_by_position(model, stream, arguments.rows, chunk, progress=True)
        for first, nats in losses.items():
            print(f"{nats:.3f} nats per token from token {first:,} on")
        if plot_positions(losses, arguments.trained, arguments.positions):
            print(f"wrote {arguments.positions}")
