"""Sweeps that run on this machine announce themselves, so that `cancel` can stop them and nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from dpgbench.core.files import write_atomically
from dpgbench.store.lock import Owner


@contextmanager
def announced(results: Path, sweep: str) -> Iterator[None]:
    """Inside, `runs/<sweep>.<token>.running.json` names this process, and SIGTERM is as good as Ctrl-C."""
    me = Owner.me()
    path = results / "runs" / f"{sweep}.{me.token}.running.json"  # a pid alone may be another host's too
    write_atomically(path, json.dumps(asdict(me)))
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
        with suppress(OSError):  # the results folder is gone, or read-only by now
            path.unlink()


def stop(results: Path, sweep: str) -> tuple[list[Owner], list[Owner]]:
    """Ask the processes of a sweep to stop. Returns those that were asked, and those on other machines, which cannot be."""
    asked, elsewhere = [], []
    name = re.compile(rf"{re.escape(sweep)}\.[0-9a-f]+\.running\.json")  # and not sweep.1's, whose name begins alike
    for path in sorted(path for path in (results / "runs").glob("*.running.json") if name.fullmatch(path.name)):
        try:
            owner = Owner.read(path)
        except (OSError, ValueError):
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
