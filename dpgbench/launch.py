"""Where cells run: in this process (`inline`) or in worker processes (`local`). Only what is not done is run."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

from dpgbench.api import Options, RunSpec
from dpgbench.store import RunFolder, read_lines

OnEvent = Callable[[RunSpec, dict[str, Any]], None]
"""Told about {"state": "started" | "done" | "failed"} of a cell and, in between, about the lines of its metrics file."""

POLL_SECONDS = 0.5


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
    from pebble import ProcessExpired, ProcessPool

    # Threads must be set before torch loads in the workers: busy processes with a thread per core each crawl.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(max(spec.scale.threads for spec in specs))
    try:
        with ProcessPool(max_workers=min(workers, len(specs)), context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.schedule(_work, args=(spec, results, plugins)): spec for spec in specs}
            seen: dict[str, int] = {}
            try:
                while futures:
                    finished, _ = wait(list(futures), timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                    for spec in futures.values():
                        _report_progress(RunFolder.of(results, spec), spec, seen, on_event)
                    for future in finished:
                        spec = futures.pop(future)
                        try:
                            state = future.result()
                        except ProcessExpired as error:
                            RunFolder.of(results, spec).fail(f"the worker process died (exit code {error.exitcode}): killed, perhaps out of memory")
                            state = "failed"
                        on_event(spec, {"state": state})
            except BaseException:
                pool.stop()
                raise
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _work(spec: RunSpec, results: Path, plugins: Path | None) -> str:
    """What a worker process does for one cell."""
    from dpgbench.runner import run_cell

    return run_cell(spec, results, plugins)


def _report_progress(folder: RunFolder, spec: RunSpec, seen: dict[str, int], on_event: OnEvent) -> None:
    """Pass on the newest line of a running cell's metrics, if there is a new one."""
    path = folder.path / "metrics.jsonl"
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    if time.time() - status.st_mtime > 3600 or seen.get(spec.folder) == status.st_size:
        return
    if spec.folder not in seen:
        on_event(spec, {"state": "started"})
    seen[spec.folder] = status.st_size
    lines = read_lines(path, last_bytes=16384)
    if lines:
        on_event(spec, lines[-1])
