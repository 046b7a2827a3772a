"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """Yields another name beside `path` for a file or a folder; what was written there is flushed and renamed to `path` at the end.

    A reader sees what was there before or what is there now, never a part; after an exception nothing is left. No two writers share the
    other name: threads share a pid, and so do hosts that share a file system. A folder does not replace one that has content; with
    `first_wins` that one, somebody else's, stays and this one is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        if partial.is_file():
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        try:
            os.replace(partial, path)
        except OSError:
            if not (first_wins and path.is_dir()):
                raise
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
