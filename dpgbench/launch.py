"""Where cells run: in this process (`inline`) or in worker processes (`local`). Only what is not done is run."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpgbench.api import Options, RunSpec
from dpgbench.store import RunFolder, read_lines

OnEvent = Callable[[RunSpec, dict[str, Any]], None]
"""Told about {"state": "started" | "done" | "failed"} of a cell and, in between, about the lines of its metrics file."""

POLL_SECONDS = 0.5

# glibc hands large blocks back to the kernel and faults them in again at the next step: a fifth to a third of a tiny cell's time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}


def launch(specs: Sequence[RunSpec], launcher: Options, results: Path, plugins: Path | None, on_event: OnEvent) -> None:
    """Run every cell of `specs`; one that fails, or whose process dies, does not stop the others.

    An interrupt stops the workers and passes through; finished cells stay finished.
    """
    if launcher.workers == 1 or len(specs) <= 1:
        _inline(specs, results, plugins, on_event)
    else:
        _local(specs, launcher.workers, results, plugins, on_event)


def _inline(specs: Sequence[RunSpec], results: Path, plugins: Path | None, on_event: OnEvent) -> None:
    from dpgbench.runner import run_cell

    for spec in specs:
        on_event(spec, {"state": "started"})
        state = run_cell(spec, results, plugins, watch=lambda line, spec=spec: on_event(spec, line))
        on_event(spec, {"state": state})


def _local(specs: Sequence[RunSpec], workers: int, results: Path, plugins: Path | None, on_event: OnEvent) -> None:
    """Both variables must be there before torch loads in the workers; busy processes with a thread per core each crawl."""
    with _environment({**ALLOCATOR, "OMP_NUM_THREADS": str(max(spec.scale.threads for spec in specs))}):
        _pool(specs, workers, results, plugins, on_event)


def _pool(specs: Sequence[RunSpec], workers: int, results: Path, plugins: Path | None, on_event: OnEvent) -> None:
    from pebble import ProcessExpired, ProcessPool

    with ProcessPool(max_workers=min(workers, len(specs)), context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.schedule(_work, args=(spec, results, plugins)): spec for spec in specs}
        seen: dict[str, int] = {}
        started = time.time()
        try:
            while futures:
                finished, _ = wait(list(futures), timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for spec in futures.values():
                    _report_progress(RunFolder.of(results, spec), spec, started, seen, on_event)
                for future in finished:
                    spec = futures.pop(future)
                    try:
                        state = future.result()
                    except ProcessExpired as error:
                        RunFolder.of(results, spec).fail(
                            f"the worker process died (exit code {error.exitcode}): killed, perhaps out of memory"
                        )
                        state = "failed"
                    on_event(spec, {"state": state})
        except BaseException:
            pool.stop()
            raise


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


def _work(spec: RunSpec, results: Path, plugins: Path | None) -> str:
    """What a worker process does for one cell."""
    from dpgbench.runner import run_cell

    return run_cell(spec, results, plugins)


def _report_progress(folder: RunFolder, spec: RunSpec, since: float, seen: dict[str, int], on_event: OnEvent) -> None:
    """Pass on the newest line of a running cell's metrics, if there is a new one."""
    path = folder.path / "metrics.jsonl"
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    if status.st_mtime < since or seen.get(spec.folder) == status.st_size:
        return
    if spec.folder not in seen:
        on_event(spec, {"state": "started"})
    seen[spec.folder] = status.st_size
    lines = read_lines(path, last_bytes=16384)
    if lines:
        on_event(spec, lines[-1])
