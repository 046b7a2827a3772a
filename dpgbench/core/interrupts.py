"""A request to stop, heard between two steps; a limit of time, heard at any moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # what SLURM sends before preemption and before the time limit


class Stop:
    """Whether somebody asked this process to stop: a flag that a signal sets and the work reads between two steps."""

    _installed: ClassVar[Stop | None] = None

    def __init__(self) -> None:
        self.asked: str | None = None
        self._working = 0  # how deep inside `on_signals`

    @classmethod
    def install(cls) -> None:
        """For a worker process, from its first moment on: while it works, the signals set the flag; while it waits, they end it."""
        cls._installed = cls()
        for number in SIGNALS:
            signal.signal(number, cls._installed._ask)

    @classmethod
    @contextmanager
    def on_signals(cls) -> Iterator[Stop]:
        """Inside, SIGTERM and SIGUSR2 set the flag and do nothing else: SLURM sends both, and the work stops at its next checkpoint.

        Signals are a process's own, so in a thread (of a test, say) nothing is changed.
        """
        stop = cls._installed or cls()
        before: dict[int, Any] = {}
        if cls._installed is None and threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, stop._ask) for number in SIGNALS}
        stop._working += 1
        try:
            yield stop
        finally:
            stop._working -= 1
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = signal.Signals(number).name
        if not self._working:
            os._exit(128 + number)


@contextmanager
def time_limit(seconds: float | None, error: Callable[[], Exception]) -> Iterator[None]:
    """Inside, `error` is raised once, after `seconds`, where Python code runs; never for None.

    By SIGALRM: code in C (a blocked system call of a library, say) is left alone until it returns. Outside the main thread no signal is
    heard, and there is no limit.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise error()

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
