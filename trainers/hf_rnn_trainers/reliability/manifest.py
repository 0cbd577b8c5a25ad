"""What files a checkpoint consists of, and whether they still are what was written."""

import errno
import hashlib
import json
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

NAME = "manifest.json"
NO_MANIFEST = f"{NAME} is missing"
# What a resumed run needs besides weights, by the names that it may have
_NEEDED = {"trainer_state.json": ["trainer_state.json"], "rng_state.pth": ["rng_state*.pth"]}
_NEEDED |= {"optimizer.pt": ["optimizer*", "global_step*"], "scheduler.pt": ["scheduler.pt", "global_step*"]}

# What Windows, CIFS, sshfs, vboxsf and FUSE mounts answer to flushing a folder
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR}


def write_manifest(folder: Path, order: int, world_size: int, batch: int | None, accepted: bool = False) -> None:
    """Write `manifest.json`: size and SHA-256 of every file below `folder`, and of the run what resuming has to know.

    Args:
        order: of this checkpoint among those of the run's folder, by which the latest is known; steps can go back.
        world_size, batch: processes, and sequences of a step over all of them; None: not known.
        accepted: its files are not, or may not be, those that a run saved.
    """
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / NAME
    }
    content = {"order": order, "world_size": world_size, "batch": batch, "accepted": accepted, "files": files}
    (folder / NAME).write_text(json.dumps({**content, "sha256": _own_digest(content)}, indent=1))


def accept_checkpoint(folder: str | Path) -> None:
    """Take the files of a checkpoint as they are: for one that was changed on purpose, weights sharded otherwise, say.

    They are read back and described by a new `manifest.json`. A checkpoint that had one keeps its place among those of
    its run; another becomes the latest.

    Raises:
        ValueError: no such folder, or one without what a run goes on with.
        OSError: a file that cannot be read back.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder: expected the folder of a checkpoint, got {folder}")
    if (missing := find_missing(folder)) is not None:
        raise ValueError(f"folder: {folder}: {missing}; a run goes on with it, or starts anew by from_pretrained")
    check_readable(folder)
    try:
        before = read_manifest(folder)
    except ValueError:
        processes = max(1, len(list(folder.glob("rng_state*.pth"))))
        before = {"order": next_order(folder.parent), "world_size": processes, "batch": None}
    write_manifest(folder, before["order"], before["world_size"], before["batch"], accepted=True)
    flush(folder)


def was_accepted(folder: Path) -> bool:
    """Whether a checkpoint's files are what its owner made of them."""
    try:
        return bool(read_manifest(folder).get("accepted"))
    except ValueError:
        return False


def check_readable(folder: Path) -> None:
    """Read back what was just written: weights' headers, the checksums inside torch's files, JSON.

    Raises:
        OSError: which file is not what it should be.
    """
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as file:
                    if bad := file.testzip():
                        raise ValueError(f"{bad} in it has another checksum")
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
        except (SafetensorError, zipfile.BadZipFile, ValueError) as error:
            raise OSError(f"{path.name} cannot be read back: {error}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content.

    Raises:
        ValueError: it is missing, damaged, or names files outside of `folder`.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(NO_MANIFEST)
    try:
        content = json.loads(path.read_bytes())
        own = content.pop("sha256")
        intact = own == _own_digest(content)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{NAME} cannot be read ({error})") from error
    if not intact:
        raise ValueError(f"{NAME} was changed since it was written")
    root = folder.resolve()
    for name in content["files"]:
        if not (folder / name).resolve().is_relative_to(root):
            raise ValueError(f"{NAME} names {name!r}, outside of the checkpoint")
    return content


def find_damage(folder: Path) -> str | None:
    """Which file in `folder` is not what its manifest tells; None where all are."""
    try:
        return _find_damage(folder)
    except ValueError as error:
        return str(error)
    except OSError as error:  # of the disk
        return f"it cannot be read ({error})"


def _find_damage(folder: Path) -> str | None:
    for name, expected in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        if _digest(path) != expected["sha256"]:
            return f"{name} was changed since it was written"
    return None


def find_missing(folder: Path) -> str | None:
    """Which part of a run's state is not in `folder`."""
    for name, patterns in _NEEDED.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"{name} is missing"
    return None


def checkpoints(run: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, the one saved last first; before it those whose manifest does not say."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("checkpoint-*")]
    ordered = sorted(((order_of(path), int(m[1]), path) for m, path in found if m and path.is_dir()), reverse=True)
    return [path for _, _, path in ordered]


def order_of(folder: Path) -> float:
    """Which one it was of those that were saved to its run's folder; infinity where the manifest does not say."""
    try:
        return read_manifest(folder)["order"]
    except (ValueError, KeyError, OSError):
        return math.inf


def next_order(run: Path) -> int:
    """For the checkpoint that is saved now."""
    return 1 + max([int(order) for path in checkpoints(run) if (order := order_of(path)) < math.inf], default=0)


def newest_whole(run: Path) -> tuple[Path | None, dict[str, str]]:
    """The latest checkpoint that is whole and that a run can go on from; what is wrong with those after it, by name."""
    damages: dict[str, str] = {}
    for path in checkpoints(run):
        damage = find_damage(path) or find_missing(path)
        if damage is None:
            return path, damages
        damages[path.name] = damage
    return None, damages


def flush(folder: Path) -> None:
    """Have all that is below `folder` on the disk itself, so that it outlives a loss of power."""
    for path in [*folder.rglob("*"), folder]:
        flush_one(path)


def flush_one(path: Path) -> None:
    """A file's content, or the names in a folder where the file system can do that by itself."""
    try:
        # Windows flushes only what is open for writing
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
