"""`hf-rnn serve CHECKPOINT`: run an OpenAI-compatible server, with sessions that keep their state."""

import argparse
import os
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from hf_rnn.checkpoints import find_checkpoint
from hf_rnn.cli.device import add_device, find_device
from hf_rnn.serving.limits import Limits
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel
from hf_rnn.tokenization.reading import read_tokenizer


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-rnn serve",
        description=__doc__,
        epilog="API keys: set HF_RNN_API_KEYS=key1,key2; without, the server is for this machine alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a checkpoint's folder, its name on the Hub, or of hf_rnn.pretrained()")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="port; 0: any free one")
    parser.add_argument("--name", help="name of the model for clients; default: the name of the checkpoint's folder")
    parser.add_argument(
        "--sessions_dir", type=Path, help="folder to store sessions in; without it they are lost when the server stops"
    )
    parser.add_argument(
        "--grace_seconds", type=int, default=10, help="seconds to finish running texts when the server stops"
    )
    for limit in fields(Limits):
        parser.add_argument(f"--{limit.name}", type=int, default=limit.default, help=limit.metadata["help"])
    add_device(parser)
    arguments = parser.parse_args(argv)
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise ValueError(f"{package} is missing: pip install 'hf-rnn[serve]'")
    import uvicorn

    from hf_rnn.serving.app import make_app
    from hf_rnn.serving.server import Server, is_loopback
    from hf_rnn.serving.text import Texts

    limits = Limits(**{limit.name: getattr(arguments, limit.name) for limit in fields(Limits)})
    keys = [key for key in (x.strip() for x in os.environ.get("HF_RNN_API_KEYS", "").split(",")) if key]
    if not keys and not is_loopback(arguments.host):
        raise ValueError(f"host: {arguments.host} can be reached by others; expected keys in HF_RNN_API_KEYS")
    checkpoint = find_checkpoint(arguments.checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    if not isinstance(model, RecurrentPreTrainedModel):
        raise ValueError(f"checkpoint: expected one of this package's models, got a {type(model).__name__}")
    model.to(find_device(arguments.device)).eval()  # type: ignore[arg-type]
    texts = Texts(read_tokenizer(checkpoint))
    name = arguments.name or Path(arguments.checkpoint).resolve().name
    app = make_app(Server(model, texts, name, keys, arguments.sessions_dir, limits))
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        limit_concurrency=2 * (limits.max_rows + limits.max_waiting) + 64,  # connections; more are refused
        timeout_graceful_shutdown=arguments.grace_seconds,
        access_log=False,
        server_header=False,
    )
