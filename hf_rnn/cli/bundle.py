"""`hf-rnn bundle CHECKPOINT`: write the model's code into its folder, so that it loads where this package is not."""

import argparse

from hf_rnn.hub.bundle import bundle


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn bundle", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder")
    path = bundle(parser.parse_args(argv).checkpoint)
    print(f"wrote {path}; it loads by from_pretrained(..., trust_remote_code=True), with torch and transformers alone")
