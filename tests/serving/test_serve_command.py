"""`hf-rnn serve` as a process: sessions outlive it, also where it is killed, and go to another one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import openai
import pytest
from openai import OpenAI
from served import alone, ids_of, small_model

from hf_rnn import byte_tokenizer
from hf_rnn.cli.main import main
from hf_rnn.serving.sessions import _read_about

SESSIONS = [f"s{n}" for n in range(24)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    endless_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def endless_model():
    model = small_model()
    model.generation_config.eos_token_id = None
    return model


class ServeProcess:
    """One on a port of its own."""

    def __init__(self, checkpoint, folder):
        command = [sys.executable, "-m", "hf_rnn.cli.main", "serve", str(checkpoint), "--sessions_dir", str(folder)]
        environment = os.environ | {"HF_RNN_API_KEYS": "one, two", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--max_tokens", "1000000", "--grace_seconds", "1"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""

    def wait(self):
        """Until it answers."""
        while not (found := re.search(r"running on (http://[\d.:]+)", self.log)):
            line = self.process.stderr.readline()
            assert line, self.log
            self.log += line
        self.client = OpenAI(base_url=f"{found[1]}/v1", api_key="two", max_retries=0, timeout=60)

    def complete(self, session, prompt, **options):
        return self.client.completions.create(
            model="tiny", prompt=prompt, temperature=0, logprobs=0, extra_body={"session": session}, **options
        )

    def end(self, kill_when=None):
        self.process.send_signal(signal.SIGTERM)
        if kill_when is not None:
            while self.process.poll() is None and not kill_when():
                time.sleep(0.001)
            self.process.kill()
        self.log += self.process.communicate(timeout=60)[1]
        return self.process.returncode


@pytest.mark.slow
def test_sessions_outlive_the_server(checkpoint, tmp_path):
    model = endless_model()
    # Both are there before the first one ends, in the middle of a text
    first, second = ServeProcess(checkpoint, tmp_path), ServeProcess(checkpoint, tmp_path)
    first.wait(), second.wait()
    texts = {}
    for name in SESSIONS:
        first.client.post("/sessions", body={"name": name}, cast_to=object)
        choice = first.complete(name, "Hello", max_tokens=3).choices[0]
        texts[name] = list(b"Hello") + ids_of(choice)
    # What the first one has not written yet the second one neither answers from an older state nor begins anew
    with pytest.raises(openai.ConflictError, match="another server has 's1'") as caught:
        second.complete("s1", "!", max_tokens=2)
    assert caught.value.code == "session_elsewhere" and int(caught.value.response.headers["retry-after"]) == 60
    for method, path, body in (("post", "/sessions", {"name": "s1"}), ("delete", "/sessions/s1", None)):
        with pytest.raises(openai.ConflictError, match="another server has 's1'"):
            getattr(second.client, method)(path, body=body, cast_to=object)
    stream = first.complete("s0", "x", max_tokens=1_000_000, stream=True)
    next(iter(stream))
    first.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(Exception):  # however a client takes that a stream is cut
        for _ in stream:
            pass
    assert first.end() in (0, -signal.SIGTERM)
    assert first.log.count("shutdown complete") == 1 and "lost" not in first.log
    for name in SESSIONS:  # what the first one has parked, the stream that was cut not included
        choice = second.complete(name, "!", max_tokens=2).choices[0]
        assert ids_of(choice) == alone(model, [*texts[name], *b"!"], 2)
    # Killed while it parks: each file is the old one or the new one
    old = {path.stat().st_ino for path in tmp_path.glob("*/*.state")}
    second.end(kill_when=lambda: len({path.stat().st_ino for path in tmp_path.glob("*/*.state")} - old) > 4)
    rows = [row for row in map(_read_about, tmp_path.glob("*/*.state")) if row]
    assert {row["id"] for row in rows} == set(SESSIONS)
    assert {row["tokens"] for row in rows} <= {8, 11} and [row["tokens"] for row in rows].count(11) > 4
    third = ServeProcess(checkpoint, tmp_path)
    third.wait()
    answers = {row["tokens"]: third.complete(row["id"], "?", max_tokens=2) for row in rows}
    assert all(answer.choices[0].text is not None for answer in answers.values())
    assert len(third.client.get("/sessions", cast_to=object)["data"]) == len(SESSIONS)
    # Ctrl-C, and again since a text does not end
    next(iter(third.complete("s0", "x", max_tokens=1_000_000, stream=True)))
    third.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    third.process.send_signal(signal.SIGINT)
    third.log += third.process.communicate(timeout=60)[1]
    after = {row["id"]: row["tokens"] for row in map(_read_about, tmp_path.glob("*/*.state")) if row}
    assert after == {row["id"]: row["tokens"] + 3 for row in rows}, third.log


def test_mistakes_are_told_in_a_line(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_RNN_API_KEYS", raising=False)
    for arguments, message in (
        (["--host", "0.0.0.0"], "host: 0.0.0.0 can be reached by others; expected keys in HF_RNN_API_KEYS"),
        (["--host", "example.com"], "host: example.com can be reached by others"),
        (["--max_rows", "0"], "max_rows: expected at least 1, got 0"),
        (["--device", "cuda:99"], "device: expected one of"),
    ):
        assert main(["serve", str(checkpoint), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nowhere")]) == 1
