"""Where cells stand: from their folders and, if they were given to SLURM, its queue. What `status` shows and `sweep` acts on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dpgbench.core.documents import text_of
from dpgbench.core.errors import UserError
from dpgbench.launch import slurm
from dpgbench.store.run_folder import RunFolder, State, read_lines

OPEN = ("running", "queued")


def standings(folders: Sequence[RunFolder], *, settle: bool = False) -> list[State]:
    """The state of each cell: those of `RunFolder.state`, and "queued" for a cell that a job in the queue will come to.

    A cell whose job died of its own doing (out of memory, say) is failed, with SLURM's word for it. `settle` writes that down in the
    cell's folder. Costs one call of `squeue` where a cell has a job, and one of `sacct` where one of those jobs has left the queue.
    Raises slurm.NoAnswer where SLURM does not answer.
    """
    states = [folder.state() for folder in folders]
    waiting = [index for index, state in enumerate(states) if state.name in ("missing", "interrupted", "stale")]
    records = {index: record for index in waiting if (record := slurm.record_of(folders[index].path)) is not None}
    if records and slurm.is_here():  # elsewhere (a laptop that got a copy of the results) the files must do
        queue = slurm.queue()
        ends = slurm.ends({record["job"] for record in records.values()} - set(queue))
        for index, record in records.items():
            states[index] = _with_job(states[index], record, queue, ends)
            if settle and states[index].name == "failed":
                folders[index].fail_unless_owned(f"{slurm.log_tail(record['log'])}\n{states[index].detail}")
    return [
        State("running", _with_time_left(folder, state.detail)) if state.name == "running" else state
        for folder, state in zip(folders, states, strict=True)
    ]


def _with_job(state: State, record: dict, queue: dict[str, str], ends: dict[str, str]) -> State:
    job = record["job"]
    if job in queue:
        so_far = f"{state.detail}; " if state.name != "missing" else ""
        return State("queued", f"{so_far}job {job} {queue[job].lower()}")
    end = ends.get(job, "")
    if end.startswith(slurm.ITS_OWN_FAULT) and state.name != "missing":
        return State("failed", f"job {job} ended {end}: {slurm.last_words(record['log'])}; its log: {record['log']}")
    said = f"job {job} {f'ended {end}' if end else 'is gone'}"
    return State(state.name, f"{state.detail}; {said}" if state.detail else said)


def _with_time_left(folder: RunFolder, progress: str) -> str:
    """The steps there are and the time they will take, where the method counts steps and has made some."""
    try:
        found = re.search(r"^ +steps: (\d{1,18})$", text_of(folder.path / "spec.yaml"), re.MULTILINE)
    except UserError:
        return progress
    lines = read_lines(folder.path / "timings.jsonl", last_bytes=8192)
    lines = [line for line in lines if type(line.get("step")) is int and type(line.get("seconds")) in (int, float)]
    if not found or not lines or not lines[-1]["step"]:
        return progress
    steps, step, seconds = int(found[1]), lines[-1]["step"], lines[-1]["seconds"]
    left = seconds / step * max(0, steps - step)
    return f"{progress} of {steps}, about {f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'} left"


def jobs_of(folders: Sequence[RunFolder], sweep: str) -> list[str]:
    """The jobs in the queue that a sweep gave these cells to."""
    records = [record for folder in folders if (record := slurm.record_of(folder.path)) is not None]
    mine = {record["job"] for record in records if record["sweep"] == sweep}
    return sorted(mine & set(slurm.queue())) if mine and slurm.is_here() else []
