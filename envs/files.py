"""Files: atomic writes, names that are safe on every file system, digests, and errors that name the path."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADVICE = {
    errno.EACCES: "make it readable and writable for you, or use a copy of the folder that is yours",
    errno.EPERM: "make it readable and writable for you, or use a copy of the folder that is yours",
    errno.EROFS: "copy the folder to where you may write, and use the copy",
    errno.ENOSPC: "free some space, and run the same command again",
    errno.EDQUOT: "free some space, and run the same command again",
    errno.ENOENT: "check the spelling of the path",
    errno.ENOTDIR: "a file is where a folder should be: move it away, or give another path",
    errno.EEXIST: "a file is where a folder should be: move it away, or give another path",
    errno.EISDIR: "a folder is where a file should be: move it away",
    errno.ENOTEMPTY: "a folder is where a file should be: move it away",
}
_KINDS: dict[int, type[OSError]] = {  # some libraries raise these without an error number
    errno.EACCES: PermissionError,
    errno.ENOENT: FileNotFoundError,
    errno.ENOTDIR: NotADirectoryError,
    errno.EEXIST: FileExistsError,
    errno.EISDIR: IsADirectoryError,
}
_CHUNK = 1 << 20  # bytes read at a time


class PathError(Exception):
    """A file or folder cannot be read or written; the message is one line that names it and says what to do."""


def path_error(error: OSError, path: object = None) -> PathError:
    """Return `error` as a `PathError`.

    Args:
        error: raised by the operating system or a library.
        path: the file that was being written; by default the file that the error names, if it names one.

    >>> print(path_error(OSError(errno.ENOSPC, "No space left on device"), "runs/short/report.html"))
    runs/short/report.html: no space left on device; free some space, and run the same command again
    """
    number = error.errno or next((n for n, kind in _KINDS.items() if isinstance(error, kind)), None)
    named = path or error.filename2 or error.filename
    words = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if named and number and not error.errno:  # a library's message may name a temporary file of its own
        words = os.strerror(number)
    what = f"{named}: {words[:1].lower()}{words[1:]}" if named else words
    return PathError(f"{what}; {ADVICE.get(number or 0, 'check that the disk can be read and written')}")


def is_path_error(error: OSError) -> bool:
    """Return whether the error is about a file or folder, rather than, for example, a network connection."""
    return error.filename is not None or error.errno in ADVICE or isinstance(error, tuple(_KINDS.values()))


def write_atomic(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write a file under a temporary name in the same folder, then rename it, so that no partial file is ever seen.

    Args:
        path: where the file goes; missing folders are made.
        write: called with the temporary path, which it must create.

    Returns:
        `path`.

    Raises:
        PathError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise path_error(error, path) from error
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically, in UTF-8."""
    return write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> Path:
    """Write a JSON file atomically, indented, in UTF-8."""
    return write_text(path, json.dumps(data, indent=2, ensure_ascii=False))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing, damaged or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def slug(name: str, longest: int = 80) -> str:
    """Return `name` as one part of a file name.

    Characters other than letters, digits and `=._+-` are replaced. A name that has to be changed gets a short hash, so
    that different names give different files.

    >>> slug("states=4")
    'states=4'
    >>> slug("a/b")
    'a-b-c14cdd'
    """
    safe = re.sub(r"[^A-Za-z0-9=._+-]+", "-", name).strip("-.")
    return safe if safe == name and len(name) <= longest else f"{safe[:longest]}-{digest(name)[:6]}"


def digest(data: str | bytes) -> str:
    """Return the SHA-256 digest of some text or bytes, in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_digest(*paths: Path) -> str:
    """Return the SHA-256 digest of the contents of some files, one after the other, in hexadecimal."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
    return found.hexdigest()
