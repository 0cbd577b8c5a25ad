"""Which server has a session, where several share a folder."""

import os
from pathlib import Path


class Claims:
    """Locks of sessions among the processes that share a folder. The system takes them back when a process ends,
    however it ends.

    A session is a byte of the file `.claims`, by its hash; the locks are POSIX's, which network file systems know, too.
    They are the process's: two stores of one process are not kept apart.

    Raises:
        OSError: a folder that cannot be written to, or a file system without locks.
        ImportError: on Windows, which has other locks.
    """

    def __init__(self, folder: Path):
        import fcntl

        self._fcntl = fcntl
        self._file = os.open(folder / ".claims", os.O_RDWR | os.O_CREAT, 0o600)  # until the process ends
        self.held: set[Path] = set()
        try:
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 2**62)  # nobody's place
        except OSError as error:
            told = f"sessions_dir: expected a file system with locks ({error.strerror})"
            raise OSError(error.errno, told, str(folder)) from error

    def take(self, file: Path) -> bool:
        """Whether it is this process's now, until `release`."""
        if file not in self.held:
            try:
                self._fcntl.lockf(self._file, self._fcntl.LOCK_EX | self._fcntl.LOCK_NB, 1, _place(file))
            except (BlockingIOError, PermissionError):  # POSIX allows either
                return False
            self.held.add(file)
        return True

    def release(self, file: Path) -> None:
        if file in self.held:
            self.held.remove(file)
            self._fcntl.lockf(self._file, self._fcntl.LOCK_UN, 1, _place(file))


def _place(file: Path) -> int:
    return int(file.stem[:15], 16)  # 60 bits of a SHA-256: two of a million sessions meet once in two million folders
