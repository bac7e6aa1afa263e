"""Files that are written whole or not at all, and a check before the work that they can be written."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dfqlib.errors import InputError

__all__ = ["check_writable", "written_whole"]


def check_writable(path: Path, argument: str) -> None:
    """Raise InputError unless a file can be written at ``path``; leaves nothing behind."""
    folder = path.parent
    if path.is_dir():
        raise InputError(f"{argument}={path} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"{argument}={path} is no ordinary file, and writing would replace it; name another place")
    if not folder.is_dir():
        raise InputError(f"{argument}={path}: the folder {folder} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise InputError(f"{argument}={path} cannot be written ({error.strerror}); name another place") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it at the end, so that no reader sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
