"""`hf-rnn COMMAND`: a thin layer over the same API that the README shows."""

import importlib
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """What it does, and the module in `hf_rnn.cli` whose `main` does it: imported when it runs."""

    summary: str
    module: str


COMMANDS = {
    "train": Command("train a model on your text, table or series, and save it", "train"),
    "predict": Command("classify texts, rate them, label their words or fill in masked tokens", "predict"),
    "forecast": Command("forecast the series of a table; writes a table and a picture", "forecast"),
    "generate": Command("continue a prompt, printed as it is generated", "generate"),
    "serve": Command("run an OpenAI-compatible server, with sessions that keep their state", "serve"),
    "eval": Command("measure the bits per byte of a language model on a text", "evaluate"),
    "compress": Command("store a model in few bits; the result loads like any other", "compress"),
    "inspect": Command("list a model's tensors: shape, bits a weight, share of zeros", "inspect"),
    "bundle": Command("add the code to a model's folder, so that it loads without this package", "bundle"),
    "push": Command("check a model's folder and upload it to the Hub", "push"),
    "export": Command("write a model as an ONNX file and compare it with torch", "export"),
    "plan": Command("estimate memory, traffic and time of a training step on many GPUs", "plan"),
    "convert": Command("convert xLSTM and TiRex-2 checkpoints from or to their authors' formats", "convert"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        print("usage: hf-rnn COMMAND [options]\n")
        for name, command in COMMANDS.items():
            print(f"  hf-rnn {name:<10} {command.summary}")
        print("\n`hf-rnn COMMAND --help` lists the options of a command.")
        if argv and argv[0] not in ("-h", "--help"):
            print(f"\nhf-rnn: unknown command {argv[0]!r}", file=sys.stderr)
            return 2
        return 0
    run = importlib.import_module(f"hf_rnn.cli.{COMMANDS[argv[0]].module}").main
    try:
        run(argv[1:])
    except (ValueError, OSError, FloatingPointError, ImportError) as error:  # ImportError: an extra is missing
        print(f"hf-rnn {argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
