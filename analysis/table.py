"""Parquet files whose metadata holds a digest of the file and the identity of what made it."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import io
import json
import re
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from nextstate.envs.files import digest, file_digest, path_error, write_atomic

PACKAGES = ("nextstate", "torch", "transformers", "nnsight", "gymnasium", "numpy", "polars", "textworld", "wandb")
DECISIVE = ("numpy", "torch", "transformers", "nnsight", "textworld")  # packages whose version may change a value
ROOMS = ("envs", "agents", "analysis")
LEVEL = 3  # of compression; 9 takes three times as long for files that are a tenth smaller
ROW_GROUP = 65_536  # rows
SPOOL = 64 << 20  # bytes
Table = pl.DataFrame | pl.LazyFrame
_KEY = "nextstate"  # of a table's metadata
_NO_DIGEST = "0" * 64  # placeholder for the digest while it is computed
_NO_CONTENT = "1" * 64  # placeholder for the digest of the rows


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of packages, without importing them."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def code_digest(*parts: str) -> str:
    """Return a digest of the modules that compute results.

    Args:
        parts: files and folders below the package, such as `envs/grammar`; by default all of `envs`, `agents` and
            `analysis` without the pages.
    """
    root = Path(__file__).resolve().parent.parent
    found = (root / part for part in parts or ROOMS)
    files = (file for path in found for file in ([path] if path.is_file() else sorted(path.rglob("*.py"))))
    return file_digest(*(file for file in files if "page" not in file.parts[:-1]))


def weights_digest(model: Any) -> str:
    """Return a digest of the weights of a model in memory (a `torch.nn.Module`)."""
    import torch

    found = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Spool:
    """Rows of a table that is made in chunks; beyond `SPOOL` bytes they wait in temporary files, not in memory.

    Args:
        schema: the columns of the table.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._frames = [pl.DataFrame(schema=schema)]
        self._size, self._files = 0, list[Path]()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, frame: pl.DataFrame) -> None:
        """Add rows.

        Raises:
            PathError: a temporary file cannot be written.
        """
        self._frames.append(frame)
        self._size += int(frame.estimated_size())
        if self._size > SPOOL:
            self._spill()

    def table(self) -> Table:
        """Return all rows: a lazy table of the temporary files if there are any, which live as long as it."""
        if self._folder is None:
            return pl.concat(self._frames)
        self._spill()
        found = pl.scan_parquet(self._files)
        weakref.finalize(found, self._folder.cleanup)
        return found

    def _spill(self) -> None:
        try:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="nextstate-")
            self._files.append(Path(self._folder.name) / f"{len(self._files)}.parquet")
            pl.concat(self._frames).write_parquet(self._files[-1], compression="lz4", statistics=False)
        except OSError as error:
            raise path_error(error) from error
        except pl.exceptions.ComputeError as error:  # raised by Polars if the disk is full
            raise path_error(OSError(errno.ENOSPC, str(error)), self._files[-1]) from error
        self._frames, self._size = [self._frames[0].clear()], 0


class Packed(NamedTuple):
    """A table as the bytes of its file, and the metadata in it: `digest` (of the file), `content`, `identity`, `notes`.

    `content` is a digest of the rows alone: tables with the same rows have the same `content`.
    """

    data: bytes
    about: dict[str, Any]


def pack(frame: Table, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> Packed:
    """Return the file of a table, which `write_packed` writes.

    Args:
        frame: the table; of a lazy one, only a part is in memory at a time.
        identity: identity of what made it, as JSON.
        notes: further JSON to store, such as the description of the model.
    """
    file = io.BytesIO()
    about: dict[str, Any] = {
        "digest": _NO_DIGEST, "content": _NO_CONTENT, "identity": dict(identity), "notes": dict(notes),
    }  # fmt: skip
    metadata = {_KEY: json.dumps(about, sort_keys=True)}
    how: dict[str, Any] = {"compression_level": LEVEL, "statistics": False, "row_group_size": ROW_GROUP}
    if isinstance(frame, pl.LazyFrame):
        frame.sink_parquet(file, metadata=metadata, engine="streaming", **how)
    else:
        frame.write_parquet(file, metadata=metadata, **how)
    data = file.getvalue()
    about["content"] = digest(str(frame.collect_schema()).encode() + data[: _footer(data)])
    data = _replaced(data, _NO_CONTENT, about["content"])
    about["digest"] = digest(data)
    return Packed(_replaced(data, _NO_DIGEST, about["digest"]), about)


def write_packed(path: Path, packed: Packed) -> dict[str, Any]:
    """Write the file of a table, atomically; return its metadata."""
    write_atomic(path, lambda partial: partial.write_bytes(packed.data))
    return packed.about


def _footer(data: bytes) -> int:
    """Return where the footer of a Parquet file begins, which holds the metadata; the rows come before it."""
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def _replaced(data: bytes, old: str, new: str) -> bytes:
    """Return a file with a digest in its metadata replaced by another of the same length."""
    at = data.rindex(old.encode())
    return data[:at] + new.encode() + data[at + len(old) :]


class Damaged(Exception):
    """The file of a table is damaged."""


def read_about(path: Path) -> dict[str, Any]:
    """Check the digest of a table and return its metadata: `digest`, `content`, `identity`, `notes`.

    Raises:
        Damaged: the file cannot be read, has no such metadata, or does not match its digest.
    """
    try:
        data = path.read_bytes()
        about: dict[str, Any] = json.loads(pl.read_parquet_metadata(data)[_KEY])
        found = about["digest"]
        blank = _replaced(data, found, _NO_DIGEST)
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise Damaged("it cannot be read as a table of a run") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what Polars raises on some damaged files
            raise
        raise Damaged("it cannot be read as a table of a run") from error
    if len(found) != len(_NO_DIGEST) or digest(blank) != found:
        raise Damaged("its content does not fit its digest")
    return about


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return a description of the difference of two identities, "" if they are equal."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += [
                f"{name} {_short(a.get(name))}, now {_short(b.get(name))}"
                for name in sorted(a.keys() | b.keys())
                if a.get(name) != b.get(name)
            ]
        else:
            found.append(f"{key} {_short(a)}, now {_short(b)}")
    return "made with " + "; ".join(found) if found else ""


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:8]
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_short(v)}" for k, v in value.items())
    return "nothing" if value is None else str(value)
