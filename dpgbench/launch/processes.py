"""Sweeps that run on this machine announce themselves, so that `cancel` can stop them and nothing else."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from dpgbench.lock import Owner
from dpgbench.store import write_atomically


@contextmanager
def announced(results: Path, sweep: str) -> Iterator[None]:
    """Inside, `runs/<sweep>.<pid>.running.json` names this process, and SIGTERM is as good as Ctrl-C."""
    path = results / "runs" / f"{sweep}.{os.getpid()}.running.json"
    write_atomically(path, json.dumps(asdict(Owner.me())))
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
        path.unlink(missing_ok=True)


def stop(results: Path, sweep: str) -> tuple[list[Owner], list[Owner]]:
    """Ask the processes of a sweep to stop. Returns those that were asked, and those on other machines, which cannot be."""
    asked, elsewhere = [], []
    for path in sorted((results / "runs").glob(f"{sweep}.*.running.json")):
        try:
            owner = Owner(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if owner.host != Owner.me().host:
            elsewhere.append(owner)
        elif owner.lives(age=float("inf")):
            os.kill(owner.pid, signal.SIGTERM)
            asked.append(owner)
        else:
            path.unlink(missing_ok=True)
    return asked, elsewhere


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
