"""The lock of a run's folder, which allows one process at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from nextstate.analysis.progress import Progress
from nextstate.analysis.run import RunError, now
from nextstate.envs.files import path_error, read_json, write_json


@contextmanager
def locked(folder: Path, command: str, wait: bool, progress: Progress) -> Iterator[None]:
    """Hold the lock of a run's folder.

    The operating system releases the lock when the process that holds it ends, however it ends.

    Args:
        folder: folder of the run, created if missing.
        command: command of this process, shown to other processes that try to use the folder.
        wait: wait until the folder is free instead of raising.
        progress: receives a message while waiting.

    Raises:
        RunError: another process holds the lock; the message gives its identity and start time.
        PathError: the folder cannot be written.
    """
    about = folder / "lock.json"
    lock = filelock.FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if not wait:
                raise RunError(
                    f"{folder} is in use by {_holder(about)}; wait for it (--wait), or give another --out"
                ) from None
            progress.on(f"waiting for {_holder(about)}")
            lock.acquire()
    except OSError as error:
        raise path_error(error, folder) from error
    except NotImplementedError as error:  # a file system without locks
        raise RunError(f"{folder} is on a file system without locks: {error}; give another --out") from error
    try:
        here = {"host": socket.gethostname(), "pid": os.getpid(), "since": now(), "command": command}
        if (other := read_json(about).get("host", here["host"])) != here["host"]:
            progress.warn(f"{_holder(about)} did not release {folder}; on host {other} it may still be writing there")
        write_json(about, here)
        yield
    finally:
        about.unlink(missing_ok=True)
        lock.release()


def _holder(about: Path) -> str:
    found = read_json(about)
    return (
        f"process {found.get('pid', 'unknown')} on host {found.get('host', 'unknown')} since "
        f"{found.get('since', 'unknown')} ({found.get('command') or 'no command'})"
    )
