"""Sessions: states by name, of one key each, in memory or as files."""

import asyncio
import errno
import hashlib
import json
import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_rnn.serving.claims import Claims
from hf_rnn.serving.errors import APIError, log
from hf_rnn.serving.limits import Limits
from hf_rnn.skeleton.cache import RecurrentCache

SWEEP_SECONDS = 60.0  # between looks at what is to be written or deleted


@dataclass(eq=False)
class Session:
    """A text by its state.

    Attributes:
        name: its owner's.
        file: where it is parked, or would be.
        state: behind all that is read; never written to. `beside` it, `tokens` (1, T) are still to be read, and
            `session` is name and age, so that a file says all.
        used: seconds since 1970.
        mark: of its file, as long as that holds the same.
    """

    name: str
    file: Path
    state: RecurrentCache
    created: float
    used: float
    mark: tuple[int, int] | None = None

    @property
    def unread(self) -> list[int]:
        return self.state.beside["tokens"][0].tolist()

    @property
    def begins(self) -> bool:
        return self.state.seen_tokens == 0 and not self.unread

    def go_on(self, state: RecurrentCache, unread: list[int]) -> None:
        """Put the text's new end in the place of the old."""
        about = json.dumps({"name": self.name, "created": self.created}).encode()
        state.beside = {
            "tokens": torch.tensor([unread], dtype=torch.long).view(1, -1),
            "session": torch.frombuffer(bytearray(about), dtype=torch.uint8)[None],
        }
        self.state, self.used, self.mark = state, time.time(), None

    def describe(self) -> dict[str, Any]:
        seen = self.state.seen_tokens + len(self.unread)
        return _described(self.name, self.created, self.used, seen, parked=False)


class Sessions:
    """All sessions of a server. Belongs to asyncio's thread; files are read and written in others, one at a time.

    A file is whole or not there. A session in memory whose file is older is written within a minute or two, when it
    leaves the memory, and when the server ends. Until then, and while it answers a request, it is claimed, and other
    servers refuse it.

    Args:
        model: whose states they are.
        initial: one row's state before the first token.
        folder: of files, which other servers with the same model may share; None: sessions live in memory alone.
        limits: see there.
    """

    def __init__(self, model: Any, initial: RecurrentCache, folder: Path | None, limits: Limits):
        self.model, self.initial, self.folder, self.limits = model, initial, folder, limits
        self.memory: OrderedDict[Path, Session] = OrderedDict()  # the least recently used first
        self.files: dict[Path, int] = {}  # bytes
        self.busy: set[Path] = set()
        self.failures, self.last_failure = 0, ""
        self._disk = asyncio.Lock()
        self.claims: Claims | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.files = self._scan()
            self.claims = Claims(folder)

    def path(self, owner: str, name: str) -> Path:
        digest = hashlib.sha256(f"{owner}\0{name}".encode()).hexdigest()
        return (self.folder or Path()) / owner / f"{digest}.state"

    async def take(self, owner: str, name: str) -> Session:
        """A session for a request, which alone has it until `give_back`.

        Raises:
            APIError: 404 there is none of this owner's; 409 another request or another server has it, or its file is
                no good; 503 it cannot be read now.
        """
        path = self._occupy(owner, name)
        try:
            async with self._disk:
                self._claim(path, name)
                return await self._find(path, name)
        except BaseException:
            self._leave(path)
            raise

    def give_back(self, session: Session) -> None:
        self._leave(session.file)

    async def begin(self, owner: str, name: str, source: str | None = None) -> Session:
        """A new session, at the beginning of a text or where another one of this owner's is.

        Raises:
            APIError: 409 there is one, or another server is about to begin it; 429 too many; 503 no room; and what
                `take` raises of `source`.
        """
        path = self.path(owner, name)
        state, unread = self.initial, []
        if source is not None:
            other = await self.take(owner, source)
            state, unread = other.state, other.unread
            self.give_back(other)
        async with self._disk:
            if self._exists(path):
                raise APIError(409, f"name: there is a session {name[:200]!r}", "name", "session_exists")
            most = self.limits.max_sessions
            if len(self.memory) + len(self.files) >= most and len(self._own(owner)) >= most:
                raise APIError(429, f"expected at most {most} sessions", code="session_quota")
            self._claim(path, name)
            try:
                await self._make_room()
                session = Session(name, path, state, time.time(), 0.0)
                session.go_on(state.clone(), unread)
                self.memory[path] = session
            finally:
                self._release(path)
        return session

    async def delete(self, owner: str, name: str) -> None:
        """
        Raises:
            APIError: as `take`.
        """
        path = self._occupy(owner, name)
        try:
            async with self._disk:
                self._claim(path, name)
                if not self._exists(path):
                    raise _unknown(name)
                self._forget(path)
        finally:
            self._leave(path)

    async def listed(self, owner: str) -> list[dict[str, Any]]:
        """What is known of each session of an owner's, the last used first."""
        found = {path: session.describe() for path, session in self.memory.items() if path.parent.name == owner}
        parked = [path for path in self.files if path.parent.name == owner and path not in found]
        for path, row in zip(parked, await asyncio.to_thread(lambda: [_read_about(x) for x in parked]), strict=True):
            if row is not None:
                found[path] = row
        return sorted(found.values(), key=lambda row: -row["used"])

    def go_on(self, session: Session, state: RecurrentCache, unread: list[int]) -> None:
        """A request has ended."""
        session.go_on(state, unread)
        self.memory[session.file] = session
        self.memory.move_to_end(session.file)

    async def sweep(self) -> None:
        """Delete what nobody has used for long, and write what rests."""
        if self.folder is not None:
            async with self._disk:
                self.files = await asyncio.to_thread(self._scan)
        now = time.time()
        oldest = now - 86400 * self.limits.session_days
        for path, session in list(self.memory.items()):
            if session.used < oldest and path not in self.busy:
                if session.mark in (None, self._mark(path)):
                    self._forget(path)
                else:
                    self.memory.pop(path)  # another server has gone on with it
            elif session.used < now - SWEEP_SECONDS and self.folder is not None:
                async with self._disk:
                    await self._park(session)
        for path in [path for path in self.files if path not in self.memory and path not in self.busy]:
            mark = self._mark(path)
            if mark is not None and mark[1] < oldest * 1e9:
                self._forget(path)

    # Who has a session: one request of one server

    def _occupy(self, owner: str, name: str) -> Path:
        path = self.path(owner, name)
        if path in self.busy:
            raise APIError(409, f"session: {name[:200]!r} is answering another request", "session", "session_busy")
        self.busy.add(path)
        return path

    def _leave(self, path: Path) -> None:
        self.busy.discard(path)
        self._release(path)

    def _claim(self, path: Path, name: str) -> None:
        if self.claims is not None and not self.claims.take(path):
            told = f"session: another server has {name[:200]!r}, and has not written its end yet"
            raise APIError(409, told, "session", "session_elsewhere", retry_after=round(SWEEP_SECONDS))

    def _release(self, path: Path) -> None:
        """For other servers, unless it is busy or newer than its file."""
        session = self.memory.get(path)
        newer = session is not None and session.mark is None
        if self.claims is not None and path not in self.busy and not newer:
            self.claims.release(path)

    async def park_all(self) -> int:
        """Write every session that is newer than its file. Returns how many could not be written; without a folder none
        was to be."""
        if self.folder is None:
            return 0
        async with self._disk:
            return sum([not await self._park(session) for session in list(self.memory.values())])

    def health(self) -> dict[str, Any]:
        parked = sum(path not in self.memory for path in self.files)
        return {
            "memory": len(self.memory),
            "memory_bytes": self._bytes(),
            "parked": parked,
            "files_bytes": sum(self.files.values()),
            "failed_writes": self.failures,
            "last_failure": self.last_failure,
        }

    # With the disk

    async def _find(self, path: Path, name: str) -> Session:
        session, mark = self.memory.get(path), self._mark(path)
        if session is not None and (session.mark is None or session.mark == mark):
            self.memory.move_to_end(path)
            return session
        self.memory.pop(path, None)  # another server has gone on with it, or deleted it
        if mark is None:
            self.files.pop(path, None)
            raise _unknown(name)
        await self._make_room()
        try:
            state = await asyncio.to_thread(RecurrentCache.load, path, self.model)
            about = json.loads(bytes(state.beside["session"][0].tolist()))
            session = Session(about["name"], path, state, about["created"], mark[1] / 1e9, mark)
        except (ValueError, KeyError) as error:
            told = str(error).removeprefix(f"{path}: ")
            raise APIError(409, f"session: cannot be read: {told}", "session", "session_unreadable") from error
        except OSError as error:
            raise APIError(503, f"session: cannot be read now: {error.strerror}", "session", retry_after=10) from error
        self.memory[path] = session
        return session

    async def _make_room(self) -> None:
        """For one more session in memory."""
        size = self.initial.nbytes
        for session in list(self.memory.values()):
            if self._bytes() + size <= self.limits.session_memory_bytes:
                return
            if session.file not in self.busy and self.folder is not None and await self._park(session):
                self.memory.pop(session.file, None)
        if self._bytes() + size > self.limits.session_memory_bytes:
            raise APIError(503, "no room for another session", code="session_room", retry_after=60)

    async def _park(self, session: Session) -> bool:
        """Write a session's file, unless it is as new. Returns whether it is now."""
        path, state = session.file, session.state
        if session.mark is not None:
            return True
        try:
            size = sum(self.files.values()) - self.files.get(path, 0) + state.nbytes
            if size > self.limits.session_disk_bytes:
                raise OSError(errno.EDQUOT, "session_disk_bytes are used up")
            await asyncio.to_thread(self._write, path, state)
        except OSError as error:
            self.failures, self.last_failure = self.failures + 1, error.strerror or str(error)
            log.error("session %s stays in memory alone: %s", path.name[:8], error)
            return False
        self.files[path] = path.stat().st_size
        if session.state is state:
            session.mark = self._mark(path)
            self._release(path)
        return session.state is state

    def _write(self, path: Path, state: RecurrentCache) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        state.save(path, self.model)

    def _forget(self, path: Path) -> None:
        self.memory.pop(path, None)
        self.files.pop(path, None)
        if self.folder is not None:
            path.unlink(missing_ok=True)
        self._release(path)

    def _mark(self, path: Path) -> tuple[int, int] | None:
        """Which file it is; None: there is none."""
        if self.folder is None:
            return None
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _exists(self, path: Path) -> bool:
        """What is as new as a file is there as long as that is."""
        session = self.memory.get(path)
        return self._mark(path) is not None or (session is not None and session.mark is None)

    def _own(self, owner: str) -> set[Path]:
        return {file for some in (self.memory, self.files) for file in some if file.parent.name == owner}

    def _bytes(self) -> int:
        return len(self.memory) * self.initial.nbytes  # all are of one size

    def _scan(self) -> dict[Path, int]:
        """Files and their sizes. What a writer that was killed left behind is deleted."""
        assert self.folder is not None
        found = {}
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
                if path.suffix == ".state":
                    found[path] = status.st_size
                elif path.name.startswith(".") and status.st_mtime < time.time() - 3600:
                    path.unlink()
            except FileNotFoundError:
                continue
        return found


def _unknown(name: str) -> APIError:
    return APIError(404, f"session: there is none of the name {name[:200]!r}", "session", "session_not_found")


def _described(name: str, created: float, used: float, tokens: int, parked: bool) -> dict[str, Any]:
    return {
        "id": name,
        "object": "session",
        "created": int(created),
        "used": int(used),
        "tokens": tokens,
        "parked": parked,
    }


def _read_about(path: Path) -> dict[str, Any] | None:
    """What a session's file says of it; None: nothing."""
    try:
        with safe_open(path, framework="pt") as opened:
            about = json.loads(bytes(opened.get_tensor("beside.session")[0].tolist()))
            tokens = int(opened.metadata()["seen_tokens"]) + opened.get_slice("beside.tokens").get_shape()[1]
        return _described(about["name"], about["created"], path.stat().st_mtime, tokens, parked=True)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
