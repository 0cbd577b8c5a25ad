"""`hf-rnn push FOLDER REPOSITORY`: check a checkpoint's folder and upload it to the Hub."""

import argparse
from pathlib import Path

from hf_rnn.hub.sharing import push


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn push", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint's folder")
    parser.add_argument("repository", help="on the Hub: owner/name, or name for a repository of your own")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="a branch, created if missing; default: main")
    parser.add_argument("--license", help="licence of the weights, for the card: apache-2.0, mit, ...")
    parser.add_argument("--message", default="Upload by hf-rnn push", help="commit message")
    a = parser.parse_args(argv)
    url = push(a.folder, a.repository, a.private or None, a.revision, a.license, a.message)
    print(f"pushed {a.folder} to {url}")
