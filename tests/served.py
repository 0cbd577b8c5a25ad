"""A server of a small model on this machine, for tests."""

import contextlib
import http.client
import json
import threading
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import uvicorn
from openai import OpenAI

import hf_rnn
from hf_rnn.serving.app import make_app
from hf_rnn.serving.limits import Limits
from hf_rnn.serving.server import Server
from hf_rnn.serving.text import Texts


def small_model(architecture="MinGRU", vocab_size=259, **settings):
    """Random, in float64, in which texts do not part by rounding; its texts are rarely UTF-8."""
    torch.manual_seed(0)
    config = getattr(hf_rnn, f"{architecture}Config")(
        hidden_size=16, num_hidden_layers=2, vocab_size=vocab_size, **settings
    )
    model = getattr(hf_rnn, f"{architecture}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def alone(model, ids: list[int], new: int) -> list[int]:
    """What generate() makes of a text, without the end token."""
    if not new:
        return []
    tokens = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids) :].tolist()
    end = model.generation_config.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


def ids_of(choice) -> list[int]:
    """The byte tokens of a completion with logprobs, without the end token."""
    special = {"<|pad|>": 256, "<|bos|>": 257, "<|eos|>": 258}
    found = [
        special[token] if token in special else int(token[8:], 16) if token.startswith("bytes:") else ord(token)
        for token in choice.logprobs.tokens
    ]
    return found[:-1] if found[-1:] == [258] else found


@dataclass(eq=False)
class Served:
    server: Server
    port: int
    model: Any

    @cache  # noqa: B019
    def client(self, key="none") -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def call(self, method: str, path: str, body: Any = None, key: str | None = None, **headers: str):
        """Status, headers, and what JSON says."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers |= {"Content-Type": "application/json"} if "content_type" not in headers else {}
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), json.loads(text) if text[:1] in b"{[" and text else text

    def complete(self, prompt, tokens=8, client=None, **extra):
        """A greedy completion's first choice, with its tokens."""
        known = {name: extra.pop(name) for name in ("stop", "seed") if name in extra}
        return (
            (client or self.client())
            .completions.create(
                model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, logprobs=0, extra_body=extra, **known
            )
            .choices[0]
        )

    def begin(self, name: str, key: str | None = None, **more):
        return self.call("POST", "/v1/sessions", {"name": name, **more}, key)[0]

    def health(self) -> dict[str, Any]:
        return self.call("GET", "/health")[2]

    def wait_for(self, condition, seconds=20):
        """Until it holds of the health."""
        end = time.monotonic() + seconds
        while not condition(health := self.health()):
            assert time.monotonic() < end, health
            time.sleep(0.01)


@contextlib.contextmanager
def serving(model, folder=None, keys=(), tokenizer=None, **limits):
    texts = Texts(tokenizer or hf_rnn.byte_tokenizer())
    server = Server(model, texts, "tiny", list(keys), folder, Limits(**limits))
    config = uvicorn.Config(make_app(server), port=0, log_level="error", timeout_graceful_shutdown=1)
    http_server = uvicorn.Server(config)
    thread = threading.Thread(target=http_server.run)
    thread.start()
    while not http_server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield Served(server, http_server.servers[0].sockets[0].getsockname()[1], model)
    finally:
        http_server.should_exit = True
        thread.join()
