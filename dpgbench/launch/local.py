"""Cells in this process, or in worker processes of this machine."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from dpgbench.bench.distributed import SINGLE_PROCESS, SingleProcess
from dpgbench.core.cell import RunSpec
from dpgbench.core.interrupts import SIGNALS, Stop
from dpgbench.core.options import Options
from dpgbench.launch import OnEvent
from dpgbench.store.run_folder import RunFolder, read_lines

POLL_SECONDS = 0.5
END_SECONDS = 30.0  # for a worker that was told to end: pebble kills it after three

# glibc hands large blocks back to the kernel and faults them in again at the next step: a fifth to a third of a tiny cell's time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}


# What a worker imports before it can begin, seconds of processor time: done once, in a process that the workers are forks of.
IMPORTS = ["dpgbench.cli", "dpgbench.run.cell", "dpgbench.run.open_cell", "dpgbench.worlds.models", "dpgbench.bench.grpo"]
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd")  # a driver that was asked anything before a fork does not work after it


def inline(
    specs: Sequence[RunSpec],
    launcher: Options,
    results: Path,
    plugins: Path | None,
    on_event: OnEvent,
    group: SingleProcess = SINGLE_PROCESS,
) -> None:
    """One after the other in this process. With `launcher=debug` the exception of the first cell that fails passes through."""
    from dpgbench.run.cell import run_cell

    how = {"checkpoint_seconds": launcher.get("checkpoint_seconds", 60.0), "let_errors_out": launcher.name == "debug", "group": group}
    how["cell_seconds"] = launcher.get("cell_seconds")
    for spec in specs:
        on_event(spec, {"state": "started"})
        state = run_cell(spec, results, plugins, watch=lambda line, spec=spec: on_event(spec, line), **how)
        give_memory_back()
        on_event(spec, {"state": state})
        if state == "interrupted":
            raise KeyboardInterrupt


def pool(specs: Sequence[RunSpec], launcher: Options, results: Path, plugins: Path | None, on_event: OnEvent) -> None:
    """`launcher.workers` at a time, one process each; a process that dies costs its cell alone and is replaced.

    So is a process whose cell takes longer than `launcher.cell_seconds`, whatever it is doing: asked to stop, then killed.
    """
    from pebble import ProcessExpired

    limit = launcher.get("cell_seconds")

    with workers(min(launcher.workers, len(specs)), specs) as processes:
        how = (results, plugins, launcher.get("checkpoint_seconds", 60.0), limit)
        futures = {processes.schedule(work, args=(spec, *how)): spec for spec in specs}
        seen: dict[str, int] = {}
        started = time.time()
        begun: dict[Any, float] = {}  # when a worker was first seen at a cell, by a clock that nobody sets
        try:
            while futures:
                finished, _ = wait(list(futures), timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for spec in futures.values():
                    _report_progress(RunFolder.of(results, spec), spec, started, seen, on_event)
                for future in futures:
                    if future.running() and time.monotonic() - begun.setdefault(future, time.monotonic()) > (limit or float("inf")):
                        future.cancel()  # pebble ends the worker
                for future in finished:
                    spec = futures.pop(future)
                    try:
                        state = future.result()
                    except ProcessExpired as error:
                        state = RunFolder.of(results, spec).fail_unless_owned(death(error.exitcode))
                    except CancelledError:
                        state = _failed_for_time(RunFolder.of(results, spec), limit)
                    on_event(spec, {"state": state})
        except BaseException:
            processes.stop()
            raise


def _failed_for_time(folder: RunFolder, limit: float) -> str:
    """Mark a cell failed whose worker is being ended; the cell is the worker's until it is gone."""
    until = time.monotonic() + END_SECONDS
    while True:
        state = folder.fail_unless_owned(f"{folder.out_of_time(limit)}; {folder.path / 'log.txt'} has where it was")
        if state != "busy" or time.monotonic() > until:
            return state
        time.sleep(0.1)


@contextmanager
def workers(count: int, specs: Sequence[RunSpec]) -> Iterator[Any]:
    """A pool of processes that run `work`, one cell after the other.

    The environment must be there before torch loads in them; busy processes with a thread per core each crawl. The signals that ask to
    stop wait until a worker can hear them: a process being born inherits the mask, and would die of them otherwise.
    """
    from pebble import ProcessPool

    threads = str(max(spec.scale.threads for spec in specs))
    context = _context()
    with _environment({**ALLOCATOR, "OMP_NUM_THREADS": threads}):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            processes = ProcessPool(max_workers=count, context=context, initializer=_begin, initargs=[dict(os.environ)])
            processes.schedule(_nothing)  # starts the pool's threads, which start all workers, with the mask of this moment
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with processes:
            yield processes


def death(exit_code: int) -> str:
    """Why a worker process is gone, for `error.txt`."""
    how = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
    return f"the worker process died ({how}){': perhaps out of memory' if exit_code == -signal.SIGKILL else ''}"


def work(spec: RunSpec, results: Path, plugins: Path | None, checkpoint_seconds: float, cell_seconds: float | None = None) -> str:
    """What a worker process does for one cell; what it writes to its standard output and error goes into the cell's folder.

    After `cell_seconds` that is where it is, the stack of every thread; who started the worker ends it then.
    """
    with Stop.on_signals(), output_into(RunFolder.of(results, spec).path / "log.txt"):
        from dpgbench.run.cell import run_cell

        if cell_seconds:
            faulthandler.dump_traceback_later(cell_seconds, file=2)
        try:
            state = run_cell(spec, results, plugins, checkpoint_seconds=checkpoint_seconds)
        finally:
            faulthandler.cancel_dump_traceback_later()
        give_memory_back()
        return state


def give_memory_back() -> None:
    """What a cell left behind: objects that know each other (a trainer and its callbacks), and pages that glibc keeps (ALLOCATOR)."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _context() -> BaseContext:
    """How workers are born: as forks of a process that has IMPORTS behind it and has computed nothing; fresh ones beside an accelerator.

    That process is Python's fork server: it lives until this one ends, starts no threads, and replaces a worker that died at once.
    """
    if any(os.path.exists(device) for device in ACCELERATORS):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    return context


def _begin(environment: dict[str, str]) -> None:
    """A worker's first act: its environment (a fork server may be older than it) and requests to stop, those sent meanwhile included."""
    os.environ.clear()
    os.environ.update(environment)
    Stop.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _nothing() -> None:
    """A first task, so that a pool starts its workers."""


@contextmanager
def output_into(path: Path) -> Iterator[None]:
    """Standard output and error, of C libraries and of crashes too, at the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = [os.dup(number) for number in (1, 2)]
    try:
        with open(path, "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.enable(file=2)
        yield
    finally:
        faulthandler.disable()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in zip((1, 2), before, strict=True):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the worker processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _report_progress(folder: RunFolder, spec: RunSpec, since: float, seen: dict[str, int], on_event: OnEvent) -> None:
    """Pass on the newest line of a running cell's metrics, if there is a new one."""
    path = folder.path / "metrics.jsonl"
    try:
        status = path.stat()
    except OSError:  # not yet there, or not any more
        return
    if status.st_mtime < since or seen.get(spec.folder) == status.st_size:
        return
    if spec.folder not in seen:
        on_event(spec, {"state": "started"})
    seen[spec.folder] = status.st_size
    lines = read_lines(path, last_bytes=16384)
    if lines:
        on_event(spec, lines[-1])
