"""What runs inside a SLURM job: a few cells, one after the other, each in a worker process that this one outlives.

submitit pickles a `Job` (plain strings and dicts), loads it on the node and calls it. The worker's death (out of memory, a crash) is told
by this process, which then goes on with the next cell. Asked to stop, it passes the word on, waits for the worker's checkpoint, and lets
submitit put the job back into the queue; the same `Job` then finds the finished cells done and the interrupted one at its checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpgbench.core.cell import RunSpec
from dpgbench.core.paths import PACKAGE
from dpgbench.store import code_snapshot
from dpgbench.store.run_folder import RunFolder

WAIT_TO_BE_STOPPED = 900.0  # seconds; SLURM kills what it has asked to stop


@dataclass
class Job:
    """The cells of one job, by their resolved configurations, and where and how to run them."""

    cells: list[dict[str, Any]]
    results: str
    plugins: str | None
    code: str
    checkpoint_seconds: float
    warning_seconds: float
    processes: int = 1
    """Of each cell, together under torchrun."""
    _asked: bool = False
    _running: Any = None

    def __call__(self) -> list[str]:
        """Run the cells; their states. Raises UserError if the pinned code is not what it was."""
        from pebble import ProcessExpired

        from dpgbench.launch import together
        from dpgbench.launch.local import death, work, workers

        self._use_pinned_code()
        results, plugins = Path(self.results), Path(self.plugins) if self.plugins else None
        specs = [RunSpec(config) for config in self.cells]
        states: list[str] = []
        how: tuple = (work, ()) if self.processes == 1 else (together.work, (self.processes, 0.7 * self.warning_seconds))
        with workers(1, specs) as pool:
            signal.signal(signal.SIGTERM, lambda *_: self._pass_on())  # submitit only logs it; USR2 is its own, and calls `checkpoint`
            for spec in specs:
                self._running = pool.schedule(how[0], args=(spec, results, plugins, self.checkpoint_seconds, *how[1]))
                try:
                    states.append(self._running.result())
                except ProcessExpired as error:
                    reason = f"{death(error.exitcode)} in job {os.environ.get('SLURM_JOB_ID', '')}"
                    states.append("interrupted" if self._asked else RunFolder.of(results, spec).fail_unless_owned(reason))
                print(f"{states[-1]}: {spec.folder}", flush=True)
                if states[-1] == "interrupted" or self._asked:
                    # Returning would end the job as completed, and SLURM would not start a preempted one again.
                    time.sleep(WAIT_TO_BE_STOPPED)
                    break
        return states

    def checkpoint(self) -> Any:
        """Called by submitit on SIGUSR2, before it requeues the job: stop the worker at its next checkpoint."""
        from submitit.helpers import DelayedSubmission

        self._pass_on()
        _remove_half_written_pickle()
        deadline = time.monotonic() + 0.8 * self.warning_seconds
        while self._running is not None and not self._running.done() and time.monotonic() < deadline:
            time.sleep(0.1)
        return DelayedSubmission(replace(self, _asked=False, _running=None))

    def _pass_on(self) -> None:
        self._asked = True
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGTERM)

    def _use_pinned_code(self) -> None:
        """The package this process runs must be the pinned one, unchanged."""
        code_snapshot.verify(Path(self.code))
        here = PACKAGE.parent
        if here != Path(self.code):
            raise RuntimeError(f"this job runs the code in {here} and not what was pinned in {self.code}; is PYTHONPATH set on the node?")


def _remove_half_written_pickle() -> None:
    """What an earlier start of this job was writing when it was killed: submitit would refuse to write the job down again, and fail it."""
    from submitit import JobEnvironment

    pickle = JobEnvironment().paths.submitted_pickle
    pickle.with_suffix(f"{pickle.suffix}.save_tmp").unlink(missing_ok=True)
