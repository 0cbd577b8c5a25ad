"""What a server gives, and to whom."""

import hashlib
from dataclasses import dataclass, field
from typing import Any


def _limit(default: int, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Limits:
    """Of one server. Every one is an option of `hf-rnn serve`."""

    max_rows: int = _limit(64, "texts at once; each takes room for a state")
    max_waiting: int = _limit(256, "texts that wait for a row; more are refused, 429")
    max_choices: int = _limit(16, "texts that one request may ask for, n times its prompts")
    max_tokens: int = _limit(4096, "new tokens of a text; a chat that asks for no number may take them all")
    max_prompt_tokens: int = _limit(131_072, "tokens of a prompt")
    prompt_tokens: int = _limit(512, "tokens of prompts between two tokens of the texts that go on")
    prompt_cache_bytes: int = _limit(64 * 2**20, "states of beginnings of prompts, each read once; 0: none are kept")
    max_body_bytes: int = _limit(4 * 2**20, "a request's body, 413")
    max_sessions: int = _limit(10_000, "sessions of one key")
    session_memory_bytes: int = _limit(2**30, "states of sessions in memory; the least recently used go to files")
    session_disk_bytes: int = _limit(8 * 2**30, "sessions' files together")
    session_days: int = _limit(30, "without use, then a session is deleted")

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name in ("max_waiting", "prompt_cache_bytes") else 1
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")


def owner_of(key: str) -> str:
    """An API key as it is written down: half of its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(b"hf_rnn key\0" + key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
