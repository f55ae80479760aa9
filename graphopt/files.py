"""Files that are written whole or not at all.

A result first goes to a temporary file in the target's folder, so on the same file system; only when it is
complete and on the disk does it take the target's name. Whatever fails, a reader sees the old file or the new
one, never a part.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from graphopt.errors import OutputError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty file to write; it becomes `path` when the block ends without an exception.

    The file gets the permissions of the one it replaces, or those of any new file. A link is followed: the
    file it points to is replaced. Whether an existing file may be replaced is the caller's decision.

    Raises:
        OutputError: the folder is missing, the target is no regular file, or the system refuses or fails to
            write; also for an OSError that leaves the block. The temporary file is gone then.
    """
    target = Path(path)
    try:
        target = Path(os.path.realpath(target))  # following links keeps them
        permissions = _permissions_to_keep(target)
        temporary = _empty_file_beside(target)
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        yield temporary
        if permissions is not None:
            temporary.chmod(permissions)
        _flush_to_disk(temporary, os.O_RDWR)
        temporary.replace(target)
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # replaced: there is nothing left to remove
            temporary.unlink()
    with contextlib.suppress(OSError):  # not every system can flush a folder; the file itself is safe
        _flush_to_disk(target.parent, os.O_RDONLY)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 with Unix line ends.

    Raises:
        OutputError: as `atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _permissions_to_keep(target: Path) -> int | None:
    """The permission bits of an existing target; None for a new one.

    Raises:
        OSError: the target is a folder or a device, which a replace would fail on or destroy.
    """
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(0, "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
    return stat.S_IMODE(mode)


def _empty_file_beside(target: Path) -> Path:
    # Not tempfile.mkstemp: its files are private (0600), and the umask that a new file should follow cannot
    # be read without setting it for every thread.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp{target.suffix}")  # some writers add or read the suffix
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _flush_to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    folder = Path(path).parent
    if isinstance(error, FileNotFoundError) and not folder.is_dir():
        return OutputError(f"cannot write {path}: there is no folder {folder}; create it first")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def sha256_of(paths: Iterable[Path]) -> str:
    """The SHA-256 of some files' bytes, one after the other, in hexadecimal digits."""
    state = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    return state.hexdigest()
