"""OpenAI's own client talks to a server on this machine: the same texts as generate(), limits, and what goes wrong."""

import http.client
import json
import random
import re
import threading
import time
from functools import partial
from pathlib import Path

import openai
import psutil
import pytest
import torch
from openai import OpenAI
from pydantic import ValidationError
from served import alone, ids_of, serving, small_model

from hf_rnn import byte_tokenizer
from hf_rnn.generation.batching import ContinuousBatch
from hf_rnn.generation.prompt_cache import PromptCache
from hf_rnn.serving.protocol import ChatBody, CompletionBody

decode = partial(byte_tokenizer().decode, skip_special_tokens=True)
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def served(model):
    limits = dict(max_rows=3, max_waiting=40, prompt_tokens=7, max_tokens=100_000, max_prompt_tokens=100)
    with serving(model, max_body_bytes=20_000, **limits) as served:
        yield served


@pytest.fixture
def client(served) -> OpenAI:
    return served.client()


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "hf_rnn"
    with pytest.raises(openai.NotFoundError, match="expected 'tiny', got 'gpt'"):
        client.completions.create(model="gpt", prompt="x")


def test_a_completion_is_generates(served, model):
    for prompt in ("Hello", "é", "", [104, 105]):
        ids = list(prompt.encode() if isinstance(prompt, str) else prompt) or [257]
        choice, expected = served.complete(prompt, 30), alone(model, ids, 30)
        assert ids_of(choice) == expected and choice.text == decode(expected)
        assert choice.finish_reason == ("length" if len(expected) == 30 else "stop")


def test_logprobs(served, model, client):
    ids = alone(model, list(b"Hello"), 12)
    given = dict(model="tiny", temperature=0, max_tokens=len(ids))
    whole = torch.tensor([[*b"Hello", *ids]])
    expected = model(whole).logits.log_softmax(-1)[0, 4:-1]
    answer = client.completions.create(prompt="Hello", logprobs=3, **given).choices[0].logprobs
    chosen = expected.gather(1, whole[0, 5:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.token_logprobs).double(), chosen, atol=1e-5, rtol=1e-5)
    tops = torch.tensor([sorted(row.values(), reverse=True) for row in answer.top_logprobs]).double()
    torch.testing.assert_close(tops, expected.topk(3).values, atol=1e-5, rtol=1e-5)
    chat = dict(messages=MESSAGES, logprobs=True, top_logprobs=2, **given)
    content = client.chat.completions.create(**chat).choices[0].logprobs.content
    streamed = [entry for event in client.chat.completions.create(**chat, stream=True)
                for choice in event.choices if choice.logprobs for entry in choice.logprobs.content]  # fmt: skip
    assert streamed == content and all(len(entry.top_logprobs) == 2 for entry in content)
    assert [entry.bytes for entry in content] == [[token] for token in alone(model, PLAIN, len(ids))]


PLAIN = list(b"user:\nHi\n\nassistant:\n")


def test_a_chat_in_the_plain_form(client, model):
    text = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=9)
    assert text.choices[0].message.content == decode(alone(model, PLAIN, 9))
    usage = text.usage
    assert usage.prompt_tokens == len(PLAIN) == usage.total_tokens - usage.completion_tokens
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    again = client.chat.completions.create(model="tiny", messages=parts, temperature=0, max_completion_tokens=9)
    assert again.choices == text.choices


@pytest.mark.parametrize("count", [1, 3])
def test_a_stream_is_the_answer(client, count):
    given = dict(model="tiny", n=count, seed=5, max_tokens=40, temperature=0.8, top_p=0.9)
    usage = {"include_usage": True}
    whole = client.chat.completions.create(messages=MESSAGES, **given)
    texts, reasons = [""] * count, [None] * count
    for event in client.chat.completions.create(messages=MESSAGES, stream=True, stream_options=usage, **given):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices] and len(set(texts)) == count
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert event.usage == whole.usage and event.usage.prompt_tokens == len(PLAIN)
    plain = client.completions.create(prompt=["ab", "c"], **given | {"n": 2})
    streamed = [""] * 4
    for event in client.completions.create(prompt=["ab", "c"], stream=True, **given | {"n": 2}):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == [choice.text for choice in plain.choices]


def test_stop_strings(served, client):
    whole = served.complete("Hello", 60).text
    for length in (1, 2, 5):
        at = next(i for i in range(9, len(whole)) if "\ufffd" not in whole[i : i + length])
        stop = whole[at : at + length]
        choice = served.complete("Hello", 60, stop=["\ufffd\ufffd\ufffd\ufffd no such", stop])
        assert choice.text == whole[: whole.find(stop)] and choice.finish_reason == "stop"
        streamed = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=60, temperature=0, stop=stop, stream=True
        )
        texts = [event.choices[0].text for event in streamed]
        assert "".join(texts) == choice.text
    assert served.health()["rows"] == 0


def test_random_arrivals_are_texts_alone(served, model):
    """Many clients at once, streamed or not, more than there are rows; prompts are read seven tokens at a time."""
    chance, failures = random.Random(0), []
    jobs = [
        (bytes(chance.randrange(32, 127) for _ in range(chance.randrange(1, 40))).decode(), chance.randrange(1, 25))
        for _ in range(16)
    ]

    def ask(prompt: str, tokens: int, wait: float):
        time.sleep(wait)
        expected = decode(alone(model, list(prompt.encode()), tokens))
        options = dict(model="tiny", prompt=prompt, max_tokens=tokens, temperature=0)
        if tokens % 2:
            text = served.client().completions.create(**options).choices[0].text
        else:
            events = served.client().completions.create(stream=True, **options)
            text = "".join(event.choices[0].text for event in events)
        if text != expected:
            failures.append((prompt, text, expected))

    threads = [threading.Thread(target=ask, args=(*job, chance.random() / 2)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert served.health()["rows"] == served.health()["waiting"] == 0


def endless(**more):
    """A request that does not end by itself."""
    return dict(model="tiny", prompt="x", max_tokens=100_000, logit_bias={}, top_k=200, seed=1) | more


@pytest.fixture
def without_end(served, monkeypatch):
    monkeypatch.setattr(served.server, "ends", frozenset())


def test_clients_that_disconnect(served, client, without_end):
    stream = client.completions.create(stream=True, **{k: v for k, v in endless().items() if k != "top_k"})
    next(iter(stream))
    assert served.health()["rows"] == 1
    stream.close()
    served.wait_for(lambda health: health["rows"] == 0)
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    body = json.dumps(endless(n=5))
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    served.wait_for(lambda health: health["rows"] == 3 and health["waiting"] == 2)
    connection.close()
    served.wait_for(lambda health: health["rows"] == health["waiting"] == 0)
    assert served.server.running == 0


def test_a_queue_that_is_full(served, without_end):
    connections = []
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/completions", json.dumps(endless(n=14)), {"Content-Type": "application/json"})
        connections.append(connection)
    served.wait_for(lambda health: health["rows"] + health["waiting"] == 42)
    status, headers, body = served.call("POST", "/v1/completions", endless(n=2))
    assert status == 429 and int(headers["retry-after"]) > 0 and body["error"]["code"] == "queue_full"
    for connection in connections:
        connection.close()
    served.wait_for(lambda health: health["rows"] + health["waiting"] == 0)


def test_a_model_that_fails(served, client, monkeypatch):
    """Whoever is in the batch is told; the next one is served."""
    step, broken = ContinuousBatch.step, threading.Event()

    def failing(self):
        if not broken.is_set() and self.rows:
            broken.set()
            raise RuntimeError("out of memory")
        return step(self)

    monkeypatch.setattr(ContinuousBatch, "step", failing)
    with pytest.raises(openai.InternalServerError, match="the model failed"):
        client.completions.create(model="tiny", prompt="x", max_tokens=20)
    broken.clear()
    with pytest.raises(openai.APIError, match="the model failed"):
        list(client.completions.create(model="tiny", prompt="x", max_tokens=20, stream=True))
    assert served.complete("x").text and served.server.running == 0


def test_a_prompt_that_cannot_be_prepared(served, monkeypatch):
    """Out of memory outside of a step: the request is told, and the model's thread lives on."""
    with monkeypatch.context() as patch:
        patch.setattr(PromptCache, "find", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        assert served.call("POST", "/v1/completions", {"model": "tiny", "prompt": "x" * 99})[0] == 500
    assert served.complete("x" * 99).text and served.server.running == 0


def test_nobody_disturbs_others(served, model):
    """The smallest temperature is the most likely token, and no number that is none."""
    options = dict(model="tiny", prompt="Hello", max_tokens=9)
    expected = decode(alone(model, list(b"Hello"), 9))
    for temperature in (5e-324, 1e-39, 1e-6):
        assert served.client().completions.create(temperature=temperature, **options).choices[0].text == expected


def test_complaints_are_few():
    """One about a list, however many of its elements are no good: each of a million would take a kilobyte."""
    bad = {"content": [1] * 999, "role": "user"}
    for kind, name, value in (
        (CompletionBody, "prompt", [1.5] * 999), (CompletionBody, "stop", [1] * 9), (ChatBody, "messages", [1] * 999),
        (ChatBody, "messages", [bad] * 999), (ChatBody, "messages", [dict.fromkeys(map(str, range(999)), 1)]),
    ):  # fmt: skip
        with pytest.raises(ValidationError) as caught:
            kind.model_validate({"model": "tiny", "prompt": "x"} | {name: value} | dict.fromkeys("abcdefgh", 1))
        assert caught.value.error_count() < 9


BAD: list[tuple[dict, str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 100_001}, "max_tokens"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"temprature": 1}, "temprature"),
    ({"prompt": "x" * 101}, "prompt"),
    ({"prompt": [1, 300]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"stream": 1}, "stream"),
    ({"session": "nobody"}, "session"),
    ({"prompt": "\ud800"}, "prompt"),
]


@pytest.mark.parametrize("change, param", BAD, ids=lambda x: str(x)[:40])
def test_what_is_refused(served, change, param):
    status, _, body = served.call("POST", "/v1/completions", {"model": "tiny", "prompt": "x", **change})
    error = body["error"]
    assert status == (404 if param == "session" else 400)
    assert error["param"].startswith(param) and param.partition(".")[0] in error["message"]


def test_what_says_nothing_is_no_matter(served):
    neutral = dict(user="me", presence_penalty=0.0, logit_bias=None, best_of=1, echo=False, suffix=None)
    assert served.call("POST", "/v1/completions", dict(model="tiny", prompt="x", **neutral))[0] == 200
    chat = dict(model="tiny", messages=MESSAGES, max_tokens=1)
    assert served.call("POST", "/v1/chat/completions", {**chat, "tools": []})[0] == 200
    for name, value in dict(tools=[{}], response_format={"type": "json_object"}, n=0, functions=[1]).items():
        status, _, body = served.call("POST", "/v1/chat/completions", {**chat, name: value})
        assert status == 400 and body["error"]["param"] == name


def malformed(chance: random.Random) -> tuple[str, str, bytes]:
    """A request that is no good: damaged JSON, wrong types, unknown names and sessions, much of everything."""
    good = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    junk = [None, True, -1, 1e308, "", "\ud800", [], {}, [[[]]], {"a": {"b": []}}, 10**30, "x" * 500, ["x", 1]]
    kind = chance.randrange(7)
    if kind == 0:  # bytes changed
        raw = bytearray(json.dumps(good).encode())
        for _ in range(chance.randrange(1, 8)):
            raw[chance.randrange(len(raw))] = chance.randrange(128, 256)
        return "POST", "/v1/completions", bytes(raw)
    if kind == 1:  # cut off, or nested without end
        raw = json.dumps(good).encode()[: chance.randrange(30)] + b"[" * chance.randrange(1, 9000)
        return "POST", chance.choice(["/v1/completions", "/v1/chat/completions", "/v1/sessions"]), raw
    if kind == 2:  # a field of another type
        wrong = {chance.choice(["model", "prompt", "temperature", "n", "stop", "session"]): chance.choice(junk[1:])}
        return "POST", "/v1/completions", json.dumps({**good, "bogus": 1, **wrong}).encode()
    if kind == 3:
        value = json.dumps(chance.choice(junk)).encode()
        return "POST", chance.choice(["/v1/completions", "/v1/chat/completions", "/v1/sessions"]), value
    if kind == 4:
        name = "".join(chance.choice("ab/.%é?#") for _ in range(9)).encode().hex()
        return chance.choice(["GET", "DELETE"]), f"/v1/sessions/..%2f{name}", b""
    if kind == 5:
        return "POST", "/v1/chat/completions", b'{"x": "' + b"y" * chance.randrange(20_000, 200_000) + b'"}'
    value = [{"role": chance.choice(["user", "tool", 1]), "content": chance.choice(junk)}] * chance.randrange(3)
    return "POST", "/v1/chat/completions", json.dumps({"model": "tini", "messages": value}).encode()


def test_a_thousand_malformed_requests(served):
    chance, process, statuses = random.Random(0), psutil.Process(), {}
    before = 0
    for n in range(1000):
        method, path, raw = malformed(chance)
        status, _, body = served.call(method, path, raw)
        assert 400 <= status < 500, (status, method, path, raw[:200], body)
        assert set(body["error"]) == {"message", "type", "param", "code"} and len(body["error"]["message"]) < 2000
        statuses[status] = statuses.get(status, 0) + 1
        if n == 100:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 40 * 2**20
    assert {400, 404, 413} <= statuses.keys()
    assert served.complete("x").text and served.health()["rows"] == 0 and not served.server.sessions.memory


def test_bodies_without_a_declared_length(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    pieces = (b"x" * 1000 for _ in range(100))
    connection.request("POST", "/v1/sessions", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "body_too_large"


def test_pages_of_others_have_no_way_in(served):
    """No CORS, no body that a form or a script could send without asking, no name but localhost."""
    body = json.dumps({"name": "x"}).encode()
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, headers, _ = served.call("POST", "/v1/sessions", body, Origin="http://evil", content_type="")
        assert status in (400, 422) and "access-control-allow-origin" not in headers, content_type
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": content_type, "content_type": "x"}
        assert served.call("POST", "/v1/sessions", body, **headers)[0] == 400
    assert served.call("OPTIONS", "/v1/sessions", Origin="http://evil")[0] == 405
    for host in ("evil.example", "evil.example:99999", "evil[.example"):
        status, _, answer = served.call("GET", "/v1/sessions", Host=host)
        assert status == 403 and "Host: expected localhost" in answer["error"]["message"]
    status, headers, page = served.call("GET", "/")
    assert status == 200 and b"<textarea" in page and "default-src 'none'" in headers["content-security-policy"]


def test_keys(model):
    with serving(model, keys=["one", "two"]) as served:
        for key in (None, "three", "on", "é"):
            status, _, body = served.call("GET", "/v1/models", key=None if key == "é" else key)
            assert status == 401 and body["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert served.client("two").models.list().data
        assert served.call("GET", "/v1/models", key="one", Host="my.example")[0] == 200
        assert served.call("GET", "/health")[0] == 200


def test_what_the_page_of_the_docs_shows_runs(served, capsys):
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace(":8000/", f":{served.port}/").replace('"mine"', '"tiny"'), {})
    assert "'tea, another way'" in capsys.readouterr().out


def test_what_prompts_begin_with_is_read_once(model):
    """A hundred with one beginning, some at once; another key's prompts are read for themselves."""
    chance = random.Random(3)
    prefix = bytes(chance.randrange(32, 127) for _ in range(700)).decode()
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, arguments, kwargs: read.append((arguments[0] if arguments else kwargs["input_ids"]).numel()),
        with_kwargs=True,
    )
    with serving(model, keys=["one", "two"], prompt_tokens=64) as served:
        client = served.client("one")
        first = served.complete(prefix + "first", 1, client=client)
        assert served.complete(prefix, 1, client=client).text is not None
        for n in range(20):
            prompt = f"{prefix}{n} and"
            choice = served.complete(prompt, 4, client=client)
            assert ids_of(choice) == alone(model, list(prompt.encode()), 4)
        read.clear()
        answer = client.completions.create(model="tiny", prompt=prefix + "first", max_tokens=1, temperature=0, n=3)
        assert answer.choices[2].text == first.text and answer.usage.prompt_tokens_details.cached_tokens == 704
        assert sum(read) == 3
        health = served.health()["tokens"]
        assert health["remembered"] >= 20 * 700
        served.client("two").completions.create(model="tiny", prompt=prefix + "first", max_tokens=1)
        assert served.health()["tokens"]["remembered"] == health["remembered"]
    hook.remove()
