"""`hf-rnn COMMAND`: a thin layer over the same API that the README shows."""

import importlib
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """What it does, and the module in `hf_rnn.cli` whose `main` does it: imported when it runs."""

    summary: str
    module: str


COMMANDS = {
    "train": Command("train a model on your text and save a checkpoint", "train"),
    "predict": Command("labels, numbers or masked tokens for texts, of a checkpoint with such a head", "predict"),
    "forecast": Command("what comes next in a table of series: a table and a picture", "forecast"),
    "generate": Command("continue a prompt, streamed to the terminal", "generate"),
    "serve": Command("an HTTP server in OpenAI's manner, with sessions that keep their state", "serve"),
    "eval": Command("bits per byte of a checkpoint on a text", "evaluate"),
    "compress": Command("quantise a checkpoint and code it in few bits; it loads like any other", "compress"),
    "inspect": Command("a table of a checkpoint's tensors: shape, nu, bits, zeros", "inspect"),
    "bundle": Command("write a checkpoint's code into its folder: it then loads without this package", "bundle"),
    "push": Command("check a checkpoint's folder and upload it to the Hub", "push"),
    "export": Command("write a checkpoint as an ONNX file, checked against torch", "export"),
    "plan": Command("memory, traffic and time of a training step on many GPUs, on paper", "plan"),
    "convert": Command("an xLSTM checkpoint from or to transformers' own xlstm, or the xlstm package's", "convert"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        print("usage: hf-rnn COMMAND [options]\n")
        for name, command in COMMANDS.items():
            print(f"  hf-rnn {name:<10} {command.summary}")
        print("\n`hf-rnn COMMAND --help` lists a command's options.")
        if argv and argv[0] not in ("-h", "--help"):
            print(f"\nhf-rnn: unknown command {argv[0]!r}", file=sys.stderr)
            return 2
        return 0
    run = importlib.import_module(f"hf_rnn.cli.{COMMANDS[argv[0]].module}").main
    try:
        run(argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"hf-rnn {argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
