"""Sessions: a text in many requests is the text in one, whatever is parked, forked, moved, or goes wrong."""

import errno
import os
import random
import stat
import time

import openai
import pytest
from served import alone, ids_of, serving, small_model

import hf_rnn
from hf_rnn import byte_tokenizer
from hf_rnn.serving import app
from hf_rnn.serving import sessions as store
from hf_rnn.serving.limits import owner_of
from hf_rnn.skeleton import cache

STATE = 2 * 16 * 8  # bytes of one, at least


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def served(model, tmp_path):
    with serving(model, tmp_path / "parked", prompt_tokens=7) as served:
        yield served


def files(served):
    return sorted((served.server.sessions.folder).glob("*/*"))


@pytest.mark.parametrize("architecture", hf_rnn.ARCHITECTURES)
def test_a_session_is_the_whole_text(architecture):
    model = small_model(architecture)
    with serving(model, prompt_tokens=5) as served:
        whole: list[int] = []
        assert served.begin("tea") == 200
        for prompt, tokens in (("Hello", 9), ("", 3), (" there", 0), ("é" * 9, 6)):
            choice = served.complete(prompt, tokens, session="tea")
            whole += prompt.encode()
            assert ids_of(choice) == alone(model, whole, tokens)
            whole += ids_of(choice)
        (row,) = served.call("GET", "/v1/sessions")[2]["data"]
        assert row["id"] == "tea" and row["tokens"] == len(whole) and not row["parked"]


def test_a_stop_string_is_not_in_the_session(model):
    """Nor is the end token: the session is behind what was shown."""
    with serving(model) as served:
        chance, stops = random.Random(0), 0
        for n in range(20):
            served.begin(f"s{n}")
            prompt = "".join(chance.choice("abcdefgh") for _ in range(9))
            free = served.complete(prompt, 40)
            if not {256, 257}.isdisjoint(ids_of(free)):
                continue  # special tokens have no text
            at = chance.randrange(len(free.text))
            stop = free.text[at : at + chance.randrange(1, 4)]
            stop = None if not stop or "\ufffd" in stop else [stop, "\x00\x01"]
            first = served.complete(prompt, 40, session=f"s{n}", stop=stop)
            ids = list(prompt.encode()) + ids_of(first)
            assert free.text.startswith(first.text)
            stops += stop is not None
            second = served.complete("+", 12, session=f"s{n}")
            assert ids_of(second) == alone(model, [*ids, *b"+"], 12)
        assert stops > 3


def test_a_chat_in_a_session_is_the_whole_chat(served, model):
    client = served.client()
    served.begin("chat")
    options = dict(model="tiny", temperature=0, max_tokens=12)
    history: list[int] = []
    for text in ("Hi", "And then?", "é"):
        new = [{"role": "user", "content": text}]
        given = client.chat.completions.create(messages=new, extra_body={"session": "chat"}, logprobs=True, **options)
        history += f"user:\n{text}\n\nassistant:\n".encode()
        expected = alone(model, history, 12)
        assert [entry.bytes for entry in given.choices[0].logprobs.content][: len(expected)] == [
            served.server.texts.token(token)[1] for token in expected
        ]
        history += [*expected, *b"\n\n"]


def test_a_fork_goes_two_ways(served, model):
    served.begin("a/../b é")
    first = list(b"Hello") + ids_of(served.complete("Hello", 5, session="a/../b é"))
    assert served.begin("other", source="a/../b é") == 200
    for name, text in (("a/../b é", " one"), ("other", " two")):
        choice = served.complete(text, 7, session=name)
        assert ids_of(choice) == alone(model, first + list(text.encode()), 7)
    assert served.begin("other") == 409 and served.begin("third", source="nobody") == 404
    assert served.call("DELETE", "/v1/sessions/a%2F..%2Fb%20%C3%A9")[2]["deleted"]
    assert served.call("DELETE", "/v1/sessions/a%2F..%2Fb%20%C3%A9")[0] == 404
    assert served.call("GET", "/v1/sessions/other")[2]["tokens"] == len(first) + 4 + 7
    with pytest.raises(openai.NotFoundError, match="there is none of the name 'a/../b é'"):
        served.complete("x", session="a/../b é")
    with pytest.raises(openai.BadRequestError, match="expected one prompt and n=1"):
        served.complete(["x", "y"], session="other")


def test_a_session_answers_one_request_at_a_time(served, model, monkeypatch):
    monkeypatch.setattr(served.server, "ends", frozenset())
    served.begin("busy")
    first = list(b"Hello") + ids_of(served.complete("Hello", 4, session="busy"))
    stream = served.client().completions.create(
        model="tiny", prompt="x", max_tokens=4096, stream=True, extra_body={"session": "busy"}
    )
    next(iter(stream))
    for method, path, body in (
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "y", "session": "busy"}),
        ("POST", "/v1/sessions", {"name": "fork", "source": "busy"}),
        ("DELETE", "/v1/sessions/busy", None),
    ):
        status, _, answer = served.call(method, path, body)
        assert status == 409 and answer["error"]["code"] == "session_busy"
    stream.close()
    served.wait_for(lambda health: health["rows"] == 0)
    # What has not ended has not been
    assert ids_of(served.complete("!", 6, session="busy"))[:1] == alone(model, [*first, *b"!"], 6)[:1]


def test_a_session_is_free_before_its_client_knows_of_the_end(served, monkeypatch):
    told, event, give_back = [], app.event, served.server.sessions.give_back
    monkeypatch.setattr(app, "event", lambda data: told.append(event(data)) or told[-1])
    monkeypatch.setattr(served.server.sessions, "give_back", lambda session: told.append("free") or give_back(session))
    served.begin("tea")
    options = dict(model="tiny", prompt="and", max_tokens=3, extra_body={"session": "tea"})
    list(served.client().completions.create(stream=True, **options))
    (end,) = (n for n, text in enumerate(told) if '"finish_reason": "' in text)
    assert told.count("free") == 1 and told.index("free") < end


def test_sessions_belong_to_a_key(model, tmp_path):
    with serving(model, tmp_path, keys=["one", "two"]) as served:
        assert served.begin("mine", "one") == 200
        served.complete("secret", session="mine", client=served.client("one"))
        for method, path, body in (
            ("POST", "/v1/completions", {"model": "tiny", "prompt": "y", "session": "mine"}),
            ("POST", "/v1/sessions", {"name": "fork", "source": "mine"}),
            ("GET", "/v1/sessions/mine", None),
            ("DELETE", "/v1/sessions/mine", None),
        ):
            assert served.call(method, path, body, "two")[0] == 404
            assert served.call(method, path, body)[0] == 401
        assert served.call("GET", "/v1/sessions", key="two")[2]["data"] == []
        assert served.begin("mine", "two") == 200  # another one
        assert served.call("GET", "/v1/sessions/mine", key="two")[2]["tokens"] == 0
        assert served.call("GET", "/v1/sessions/mine", key="one")[2]["tokens"] == 14
    names = [path.name for path in tmp_path.rglob("*") if path.name != ".claims"]
    assert len(names) == 4 and not any(secret in name for name in names for secret in ("mine", "one", "two"))


def test_the_least_recently_used_go_to_files_and_come_back(model, tmp_path):
    one = cache_bytes(model)
    with serving(model, tmp_path / "parked", session_memory_bytes=2 * one) as served:
        texts: dict[str, list[int]] = {f"s{n}": [] for n in range(6)}
        for name in texts:
            served.begin(name)
        chance = random.Random(0)
        for _ in range(25):
            name = chance.choice(list(texts))
            choice = served.complete(" and", 4, session=name)
            texts[name] += b" and"
            assert ids_of(choice) == alone(model, texts[name], 4)
            texts[name] += ids_of(choice)
            assert served.health()["sessions"]["memory_bytes"] <= 2 * one
        health = served.health()["sessions"]
        assert health["memory"] == 2 and health["parked"] == 4 and health["failed_writes"] == 0
        rows = served.call("GET", "/v1/sessions")[2]["data"]
        assert {row["id"]: row["tokens"] for row in rows} == {name: len(ids) for name, ids in texts.items()}
        assert sum(row["parked"] for row in rows) == 4
        for path in files(served):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(served.server.sessions.folder.stat().st_mode) == 0o700
    with serving(model, tmp_path / "parked") as served:  # the next server finds them
        for name, ids in texts.items():
            assert ids_of(served.complete("!", 5, session=name)) == alone(model, [*ids, *b"!"], 5)


def cache_bytes(model) -> int:
    return sum(x.nbytes for layer in model.model.layers for x in layer.initial_states(1))


def test_a_full_disk_loses_nothing(model, tmp_path, monkeypatch):
    write, full = cache.write_state, [True]

    def writing(*arguments):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(cache, "write_state", writing)
    with serving(model, tmp_path, session_memory_bytes=2 * cache_bytes(model)) as served:
        texts = {name: list(b"Hello") for name in ("a", "b")}
        for name in texts:
            served.begin(name)
            texts[name] += ids_of(served.complete("Hello", 4, session=name))
        status, headers, answer = served.call("POST", "/v1/sessions", {"name": "c"})
        assert status == 503 and answer["error"]["code"] == "session_room" and "retry-after" in headers
        health = served.health()["sessions"]
        assert health["failed_writes"] >= 2 and health["last_failure"] == "No space left on device"
        for name in texts:
            choice = served.complete("!", 4, session=name)
            assert ids_of(choice) == alone(model, [*texts[name], *b"!"], 4)
            texts[name] += [*b"!", *ids_of(choice)]
        assert not list(tmp_path.glob("*/*"))
        full[0] = False
        assert served.begin("c") == 200
        full[0] = True  # what is in a file stays there
        served.complete("x", session="c")
    full[0] = False
    with serving(model, tmp_path) as served:
        (row,) = served.call("GET", "/v1/sessions")[2]["data"]
        assert ids_of(served.complete("!", 4, session=row["id"])) == alone(model, [*texts[row["id"]], *b"!"], 4)


def test_quotas(model, tmp_path):
    with serving(model, tmp_path, max_sessions=3, keys=["one", "two"], session_disk_bytes=1) as served:
        assert [served.begin(name, "one") for name in "abcd"] == [200, 200, 200, 429]
        assert served.begin("d", "two") == 200
        assert served.call("DELETE", "/v1/sessions/a", key="one")[0] == 200
        assert served.begin("d", "one") == 200
    assert not list(tmp_path.glob("*/*"))  # and the log says that they are lost


def test_expiry_and_writing_in_time(served):
    """What rests is written; what nobody has used for long is deleted, in memory and on the disk."""
    for name in ("old", "parked", "new"):
        served.begin(name)
        served.complete("x", session=name)
    sweep(served)
    assert files(served) == []  # they have just been used
    held = served.server.sessions.memory
    for session in held.values():
        session.used -= 100
    sweep(served)
    assert len(files(served)) == 3 and all(session.mark for session in held.values())
    by_name = {session.name: session for session in list(held.values())}
    by_name["old"].used -= 31 * 86400
    parked = by_name["parked"].file
    del held[parked]
    long_ago = time.time() - 31 * 86400
    os.utime(parked, (long_ago, long_ago))
    left = parked.with_name(".killed")
    left.touch()
    os.utime(left, (long_ago, long_ago))
    sweep(served)
    assert [path.name for path in files(served)] == [by_name["new"].file.name] and list(held) == [by_name["new"].file]
    assert served.call("GET", "/v1/sessions/old")[0] == served.call("GET", "/v1/sessions/parked")[0] == 404


def test_files_that_are_no_good(model, tmp_path):
    with serving(model, tmp_path) as served:
        for name in ("damaged", "cut", "other"):
            served.begin(name)
            served.complete("Hello", session=name)
        paths = {session.name: session.file for session in served.server.sessions.memory.values()}
    raw = paths["damaged"].read_bytes()
    paths["damaged"].write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    paths["cut"].write_bytes(raw[:100])
    with serving(model, tmp_path) as served:
        for name, said in (("damaged", "SHA-256"), ("cut", "no state")):
            status, _, answer = served.call("GET", f"/v1/sessions/{name}")
            assert status == 409 and said in answer["error"]["message"] and str(tmp_path) not in str(answer)
        assert served.complete("x", session="other").text is not None
        assert len(served.call("GET", "/v1/sessions")[2]["data"]) == 2  # but for the one that says nothing
    with serving(small_model("GRU"), tmp_path) as served:
        status, _, answer = served.call("GET", "/v1/sessions/other")
        assert status == 409 and "the state of another model" in answer["error"]["message"]


def test_two_servers_with_one_folder(model, tmp_path):
    """A session goes where its file goes; the newer one is in force."""
    with serving(model, tmp_path) as first, serving(model, tmp_path) as second:
        first.begin("tea")
        text = list(b"Hello") + ids_of(first.complete("Hello", 5, session="tea"))
        assert second.call("GET", "/v1/sessions/tea")[0] == 404  # not yet parked
        park(first)
        for server, prompt in ((second, "a"), (first, "b"), (first, "c"), (second, "d")):
            choice = server.complete(prompt, 5, session="tea")
            text += prompt.encode()
            assert ids_of(choice) == alone(model, text, 5)
            text += ids_of(choice)
            park(server)
        assert second.call("DELETE", "/v1/sessions/tea")[0] == 200
        assert first.call("GET", "/v1/sessions/tea")[0] == 404


def test_what_another_server_has_gone_on_with_is_not_old(model, tmp_path):
    """A copy in memory that rests here for a month says nothing of a session that is used there."""
    with serving(model, tmp_path) as first, serving(model, tmp_path) as second:
        first.begin("tea")
        park(first)
        text = list(b"Hello") + ids_of(second.complete("Hello", 5, session="tea"))
        park(second)
        (session,) = first.server.sessions.memory.values()
        session.used -= 31 * 86400
        sweep(first)
        assert ids_of(first.complete("!", 5, session="tea")) == alone(model, [*text, *b"!"], 5)
        park(first)
        assert second.call("DELETE", "/v1/sessions/tea")[0] == 200 and first.begin("tea") == 200


def test_a_session_that_is_taken_while_it_is_to_be_deleted(served):
    """One of both is refused; it does not come back."""
    import asyncio

    async def at_once():
        store, owner = served.server.sessions, owner_of("")
        async with store._disk:  # which both wait for
            deleting = asyncio.create_task(store.delete(owner, "tea"))
            taking = asyncio.create_task(store.take(owner, "tea"))
            await asyncio.sleep(0.05)
        return await asyncio.gather(deleting, taking, return_exceptions=True)

    served.begin("tea")
    deleted, taken = asyncio.run_coroutine_threadsafe(at_once(), served.server.thread.loop).result(20)
    assert deleted is None and taken.code == "session_busy"
    assert served.call("GET", "/v1/sessions/tea")[0] == 404 and served.begin("tea") == 200


def sweep(served):
    import asyncio

    loop = served.server.thread.loop
    asyncio.run_coroutine_threadsafe(served.server.sessions.sweep(), loop).result(20)


def park(served):
    import asyncio

    loop = served.server.thread.loop
    assert asyncio.run_coroutine_threadsafe(served.server.sessions.park_all(), loop).result(20) == 0


def test_a_file_is_a_state_for_the_command_line(served, tmp_path):
    """`hf-rnn generate --state` reads the same."""
    served.begin("tea")
    served.complete("Hello", 5, session="tea")
    park(served)
    (path,) = files(served)
    state = hf_rnn.RecurrentCache.load(path, served.model)
    assert state.seen_tokens + state.beside["tokens"].shape[1] == 10
    assert store._read_about(path)["id"] == "tea" and byte_tokenizer().bos_token_id == 257
