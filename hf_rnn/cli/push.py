"""`hf-rnn push FOLDER REPOSITORY`: check a checkpoint's folder and upload it to the Hub."""

import argparse
from pathlib import Path

from hf_rnn.hub.sharing import push


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn push", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint's folder")
    parser.add_argument("repository", help="on the Hub: owner/name, or a name of your own")
    parser.add_argument("--private", action="store_true", help="if the repository is new, only you can see it")
    parser.add_argument("--revision", help="a branch, made if it is not there; default: main")
    parser.add_argument("--license", help="of the weights, for the card: apache-2.0, mit, ...")
    parser.add_argument("--message", default="Upload by hf-rnn push", help="of the commit")
    a = parser.parse_args(argv)
    url = push(a.folder, a.repository, a.private or None, a.revision, a.license, a.message)
    print(f"pushed {a.folder} to {url}")
