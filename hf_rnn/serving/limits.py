"""What a server gives, and to whom."""

import hashlib
from dataclasses import dataclass, field
from typing import Any


def _limit(default: int, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Limits:
    """Of one server. Every one is an option of `hf-rnn serve`."""

    max_rows: int = _limit(64, "texts generated at once; each needs memory for a state")
    max_waiting: int = _limit(256, "texts that may wait; more are refused with status 429")
    max_choices: int = _limit(16, "texts that one request may ask for: n times its number of prompts")
    max_tokens: int = _limit(4096, "most new tokens of a text, and the default of chats that give no number")
    max_prompt_tokens: int = _limit(131_072, "tokens of a prompt")
    prompt_tokens: int = _limit(512, "prompt tokens read between two generated tokens of running texts")
    prompt_cache_bytes: int = _limit(64 * 2**20, "cache of states of common beginnings of prompts; 0: no cache")
    max_body_bytes: int = _limit(4 * 2**20, "largest body of a request; larger ones are refused with status 413")
    max_sessions: int = _limit(10_000, "sessions of one API key")
    session_memory_bytes: int = _limit(
        2**30, "memory for the states of sessions; the least recently used are moved to files"
    )
    session_disk_bytes: int = _limit(8 * 2**30, "size of all sessions' files")
    session_days: int = _limit(30, "delete a session that was unused for so many days")

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name in ("max_waiting", "prompt_cache_bytes") else 1
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")


def owner_of(key: str) -> str:
    """An API key as it is written down: half of its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(b"hf_rnn key\0" + key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
