"""Where cells run: in this process (`inline`, `debug`), in worker processes (`local`), or in SLURM jobs (`slurm`, slurm.py).

One cell's failure never stops another, and every launcher runs what it is given and nothing twice: a cell has one owner (lock.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpgbench.bench import distributed
from dpgbench.bench.distributed import SINGLE_PROCESS, SingleProcess
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.core.options import Options

OnEvent = Callable[[RunSpec, dict[str, Any]], None]
"""Told about {"state": "started" | "done" | "failed" | "busy" | "interrupted"} of a cell and, in between, about its metrics' lines."""


def check(launcher: Options) -> None:
    """Raises UserError for settings of a launcher that cannot be, naming value, rule and fix."""
    for key in ("workers", "array_parallelism", "cells_per_job"):
        value = launcher.get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"launcher.{key}={value}: a whole number from 1 up; write launcher.{key}=2")
    seconds = launcher.get("checkpoint_seconds", 60.0)
    if not isinstance(seconds, int | float) or seconds < 0:
        raise UserError(f"launcher.checkpoint_seconds={seconds}: seconds from 0 up; write launcher.checkpoint_seconds=60")
    limit = launcher.get("cell_seconds")
    if limit is not None and (not isinstance(limit, int | float) or isinstance(limit, bool) or not 0 < limit < float("inf")):
        raise UserError(f"launcher.cell_seconds={limit}: seconds above 0, or null for no limit; write launcher.cell_seconds=3600")
    if limit is not None and distributed.size() > 1:
        raise UserError(f"launcher.cell_seconds={limit:g}: not under torchrun, whose processes cannot be stopped one by one; leave it out")
    if launcher.name == "slurm":
        from dpgbench.launch import slurm

        slurm.check(launcher)


def launch(
    specs: Sequence[RunSpec],
    launcher: Options,
    results: Path,
    plugins: Path | None,
    on_event: OnEvent,
    group: SingleProcess = SINGLE_PROCESS,
) -> None:
    """Run every cell of `specs` here and return when they are through; one that fails, or whose process dies, does not stop the others.

    An interrupt stops the workers and passes through; finished cells stay finished, and the others go on from their checkpoints.
    """
    from dpgbench.launch import local

    if launcher.get("workers", 1) == 1 or len(specs) <= 1:
        local.inline(specs, launcher, results, plugins, on_event, group)
    else:
        local.pool(specs, launcher, results, plugins, on_event)
