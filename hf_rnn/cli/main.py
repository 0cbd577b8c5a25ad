"""`hf-rnn train | generate | eval`: a thin layer over the same API that the README shows."""

import sys

COMMANDS = {
    "train": "train a model on your text and save a checkpoint",
    "generate": "continue a prompt, streamed to the terminal",
    "eval": "bits per byte of a checkpoint on a text",
    "compress": "quantise a checkpoint and code it in few bits; it loads like any other",
    "inspect": "a table of a checkpoint's tensors: shape, nu, bits, zeros",
    "bundle": "write a checkpoint's code into its folder: it then loads without this package",
    "push": "check a checkpoint's folder and upload it to the Hub",
    "plan": "memory, traffic and time of a training step on many GPUs, on paper",
    "convert": "an xLSTM checkpoint from or to transformers' own xlstm, or the xlstm package's",
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        print("usage: hf-rnn COMMAND [options]\n")
        for name, summary in COMMANDS.items():
            print(f"  hf-rnn {name:<10} {summary}")
        print("\n`hf-rnn COMMAND --help` lists a command's options.")
        if argv and argv[0] not in ("-h", "--help"):
            print(f"\nhf-rnn: unknown command {argv[0]!r}", file=sys.stderr)
            return 2
        return 0
    import hf_rnn  # noqa: F401  registers the architectures

    if argv[0] == "train":
        from hf_rnn.cli.train import main as command
    elif argv[0] == "generate":
        from hf_rnn.cli.generate import main as command
    elif argv[0] == "eval":
        from hf_rnn.cli.evaluate import main as command
    elif argv[0] == "compress":
        from hf_rnn.cli.compress import main as command
    elif argv[0] == "inspect":
        from hf_rnn.cli.inspect import main as command
    elif argv[0] == "bundle":
        from hf_rnn.cli.bundle import main as command
    elif argv[0] == "push":
        from hf_rnn.cli.push import main as command
    elif argv[0] == "plan":
        from hf_rnn.cli.plan import main as command
    else:
        from hf_rnn.cli.convert import main as command
    try:
        command(argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"hf-rnn {argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
