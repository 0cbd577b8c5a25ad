"""`hf-rnn bundle CHECKPOINT`: add the model's code to its folder, so that it loads without this package."""

import argparse

from hf_rnn.hub.bundle import bundle


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn bundle", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder")
    path = bundle(parser.parse_args(argv).checkpoint)
    print(f"wrote {path}; load it with from_pretrained(..., trust_remote_code=True): torch and transformers are enough")
