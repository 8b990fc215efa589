"""Files that are written whole or not at all, and a full disk as one clear error that names the path."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoprune.core import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """A name beside `path` to write to; what is there at the end becomes `path`, at once. lasting: it is flushed to the
    disk before, which takes its time.

    Raises:
        StorageError: the disk is full; what was at `path` is still there.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(3).hex()}.tmp")
    with room(path):
        try:
            temporary.touch()  # what replaces it may have rights of its own
            rights = temporary.stat().st_mode & 0o777
            yield temporary
            temporary.chmod(rights)
            if lasting:
                _flush(temporary)
            temporary.replace(path)
            if lasting:
                _flush(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append(path: Path, text: str) -> None:
    """Add to a file, whole or not at all.

    Raises:
        StorageError: the disk is full; the file ends where it ended.
    """
    with room(path), path.open("ab", buffering=0) as file:
        end, left = file.seek(0, os.SEEK_END), memoryview(text.encode())
        try:
            while left:
                left = left[file.write(left) :]  # a disk that gets full takes a part first
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


@contextmanager
def room(path: Path) -> Iterator[None]:
    """A full disk inside is a StorageError that names `path`."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise StorageError(f"the disk is full: {path} cannot be written") from error


def nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it, that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def is_full(error: Exception) -> bool:
    """Whether it says that a disk, or a quota on it, is full; safetensors says so in words only."""
    return getattr(error, "errno", None) in FULL or any(f"(os error {number})" in str(error) for number in FULL)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
