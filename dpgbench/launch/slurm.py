"""Cells as SLURM jobs: submit arrays with submitit, read the queue, cancel.

A cell's folder says which job it was given to (`job.json`), so that any later command, on any host of the cluster, can tell a queued
cell from a lost one. `squeue` is needed; `sacct`, or `scontrol` while SLURM still remembers a job, says how a job ended.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpgbench.config import validate
from dpgbench.core.cell import RunSpec
from dpgbench.core.documents import Unreadable, json_of, text_of
from dpgbench.core.errors import UserError
from dpgbench.core.files import write_atomically
from dpgbench.core.options import Options
from dpgbench.launch.slurm_job import Job
from dpgbench.store import code_snapshot
from dpgbench.store.run_folder import RunFolder

RESOURCES = ("gpus", "cpus", "mem_gb", "time_min")
# A job that is preempted in its first second must not die of the signal before submitit listens: ignored, until it does.
PYTHON = f"""sh -c 'trap "" USR2 TERM; exec "$0" "$@"' {shlex.quote(sys.executable)}"""
# Every other end, and a state that is none (accounting lags behind the queue), says nothing against the cell.
ITS_OWN_FAULT = ("FAILED", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Submitted:
    """One job array (or single job): its id, how many jobs and cells, and where its logs are."""

    job: str
    jobs: int
    cells: int
    log: Path


class NoAnswer(UserError):
    """SLURM's controller does not answer: it is away or busy, and may be back in a minute."""


def check(launcher: Options) -> None:
    """Raises UserError if there is no SLURM here, or for a setting that cannot be."""
    given = launcher.processes
    if given is not None and (not isinstance(given, int) or given < 1):
        raise UserError(f"launcher.processes={given}: a whole number from 1 up, or null for one to each GPU; write launcher.processes=null")
    for program in ("sbatch", "squeue", "scancel", "srun"):
        if shutil.which(program) is None:
            raise UserError(f"launcher=slurm: there is no {program} on this machine; run it on a login node, or use launcher=local")
    try:
        import submitit  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("launcher=slurm: submitit is not installed; write `pip install --no-deps -r requirements.lock`") from None
    if launcher.warning_seconds >= 60 * min(setting["time_min"] for setting in _all_resources(launcher)):
        raise UserError(
            f"launcher.warning_seconds={launcher.warning_seconds}: must be less than the time limit; write launcher.warning_seconds=60"
        )


def _all_resources(launcher: Options) -> list[dict[str, Any]]:
    table = launcher.plain()["resources"]
    return [_resources(launcher, scale, "") for scale in table]


def _resources(launcher: Options, scale: str, method: str) -> dict[str, Any]:
    """What a cell of this scale and method asks SLURM for."""
    table = launcher.plain()["resources"]
    unknown = sorted({key for setting in table.values() for key in setting} - set(RESOURCES))
    if unknown:
        raise UserError(f"launcher.resources: {unknown[0]} is not one of {', '.join(RESOURCES)}; other options go to launcher.sbatch")
    asked = {**table["default"], **table.get(scale, {}), **table.get(method, {})}
    return asked | {key: launcher[key] for key in RESOURCES if launcher[key] is not None}


def submit(specs: Sequence[RunSpec], launcher: Options, results: Path, plugins: Path | None, sweep: str, commit: str) -> list[Submitted]:
    """Pin the code and submit what is given, an array for each kind of resources. Raises UserError with SLURM's own words."""
    import submitit

    folder = results.resolve() / "jobs"
    _need_room_for_names(folder)
    code = code_snapshot.pin(results, plugins, commit)
    groups: dict[tuple[str, int], list[RunSpec]] = {}
    for spec in specs:
        asked, processes = _asked(launcher, spec)
        groups.setdefault((json.dumps(asked, sort_keys=True), processes), []).append(spec)
    submitted = []
    for (asked, processes), group in groups.items():
        executor = submitit.SlurmExecutor(folder, max_num_timeout=launcher.max_timeouts, python=PYTHON)
        executor.update_parameters(**_parameters(launcher, json.loads(asked), code, sweep))
        packs = [group[start : start + launcher.cells_per_job] for start in range(0, len(group), launcher.cells_per_job)]
        largest = _largest_array()
        for start in range(0, len(packs), largest):
            part = packs[start : start + largest]
            try:
                with redirect_stderr(io.StringIO()), executor.batch():  # submitit echoes sbatch, and raises its words as well
                    jobs = [executor.submit(_job(pack, launcher, results, code, processes)) for pack in part]
            except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
                raise UserError(f"launcher=slurm: {_reason(str(error))}; `sinfo` shows the partitions there are") from None
            for job, pack in zip(jobs, part, strict=True):
                job.paths.submitted_pickle.chmod(0o600)
                for spec in pack:
                    record = {"job": job.job_id, "sweep": sweep, "log": str(job.paths.stdout), "submitted": time.time(), "code": code.name}
                    write_atomically(RunFolder.of(results, spec).path / "job.json", json.dumps(record))
            first = jobs[0].job_id.partition("_")[0]
            submitted.append(Submitted(first, len(jobs), sum(map(len, part)), folder / f"{first}_*_log.out"))
    return submitted


def check_cells(specs: Iterable[RunSpec], launcher: Options) -> None:
    """Raises UserError for the first cell that cannot be shared by as many processes as it would get."""
    for spec in specs:
        _, processes = _asked(launcher, spec)
        if processes > 1:
            validate.check_shared(spec, processes)


def _asked(launcher: Options, spec: RunSpec) -> tuple[dict[str, Any], int]:
    """A cell's resources and its number of processes. A method that trains no policy has nothing to share: one process, one GPU."""
    asked = _resources(launcher, spec.scale.name, spec.method.name)
    if spec.method.get("policy") is None:
        return asked | {"gpus": min(1, asked["gpus"])}, 1
    return asked, launcher.processes or max(1, asked["gpus"])


def _job(pack: Sequence[RunSpec], launcher: Options, results: Path, code: Path, processes: int = 1) -> Job:
    cells = [_with_whole_paths(json.loads(json.dumps(dict(spec.config)))) for spec in pack]
    plugins = str(code / "plugins") if (code / "plugins").is_dir() else None
    return Job(cells, str(results.resolve()), plugins, str(code), launcher.checkpoint_seconds, launcher.warning_seconds, processes)


def _with_whole_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A cell's settings for a job, which starts in another folder: a setting beside a digest of its content is a path."""
    for section in (config["task"], config["method"], config["scale"]):
        for name in [key.removesuffix("_sha256") for key in section if key.endswith("_sha256")]:
            if name in section:
                section[name] = str(Path(section[name]).expanduser().resolve())
    return config


def _parameters(launcher: Options, asked: Mapping[str, Any], code: Path, sweep: str) -> dict[str, Any]:
    """sbatch's options in submitit's words. The job starts in the pinned code, where `python -m` finds it first."""
    wanted = {
        "job_name": f"dpgbench-{re.sub(r'[^A-Za-z0-9_.-]', '-', sweep)}", "time": asked["time_min"], "cpus_per_task": asked["cpus"],
        "mem": f"{int(1024 * asked['mem_gb'])}M", "gpus_per_node": asked["gpus"] or None, "partition": launcher.partition,
        "account": launcher.account, "qos": launcher.qos, "constraint": launcher.constraint,
    }  # fmt: skip
    python = [f"export PYTHONPATH={shlex.quote(str(code))}", "export PYTHONDONTWRITEBYTECODE=1 PYTHONUTF8=1"]
    return {
        **{key: value for key, value in wanted.items() if value is not None},
        "array_parallelism": launcher.array_parallelism, "signal_delay_s": launcher.warning_seconds, "stderr_to_stdout": True,
        "setup": [*launcher.plain()["setup"], *python],
        "additional_parameters": {"chdir": str(code), "requeue": True, **launcher.plain()["sbatch"]},
    }  # fmt: skip


def _need_room_for_names(folder: Path) -> None:
    if found := re.search(r"[%\\\s:]", str(folder)):
        reads = "PYTHONPATH reads a colon" if found[0] == ":" else "SLURM reads %, backslashes and spaces"
        raise UserError(f"results={folder.parent}: {reads} in a path its own way; choose another folder with results=DIR")
    _make_private(folder)


def _make_private(folder: Path) -> None:
    """A job unpickles what lies in the folder, which runs it: nobody else may write there. Raises UserError for another user's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise UserError(f"results={folder.parent}: {folder} is another user's, and jobs run what is in it; choose another with results=DIR")
    folder.chmod(0o700)


def _largest_array() -> int:
    """MaxArraySize - 1 of this cluster."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _output("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(found[1]) - 1) if found else 1000


def _reason(text: str) -> str:
    """What sbatch said, out of submitit's traceback of it."""
    lines = [line.strip() for line in text.splitlines() if "sbatch: error:" in line or "error:" in line.lower()]
    return "; ".join(dict.fromkeys(line.removeprefix("subprocess-exec(9): ") for line in lines))[:400] or text.strip().splitlines()[-1]


# ---- afterwards


def is_here() -> bool:
    """Whether this machine can ask SLURM."""
    return shutil.which("squeue") is not None


def record_of(folder: Path) -> dict[str, Any] | None:
    """Which job a cell was given to; None if to none.

    Its log is looked for where this results folder has logs: a folder from elsewhere names no other file of this machine.
    """
    try:
        record = json_of(text_of(folder / "job.json"))
    except Unreadable:
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("job", "sweep", "log")):
        return None
    if not re.fullmatch(r"\d+(_\d+)?", record["job"], re.ASCII):  # it becomes an argument of SLURM's commands
        return None
    return record | {"log": str(folder.resolve().parents[1] / "jobs" / Path(record["log"]).name)}


def queue() -> dict[str, str]:
    """The user's jobs that wait or run, by id: "PENDING (Resources)". Raises NoAnswer if SLURM does not answer."""
    try:
        done = _told(["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r"], timeout=60)
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"squeue does not answer: nothing came in {error.timeout:.0f} s; try again later") from None
    if done.returncode:
        raise NoAnswer(f"squeue does not answer: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}; try again later")
    rows = [line.strip().split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    return {job: state if state != "PENDING" else f"{state} ({reason})" for job, state, reason in rows}


def ends(jobs: Iterable[str]) -> dict[str, str]:
    """How jobs that left the queue ended, by id ("OUT_OF_MEMORY", "TIMEOUT", ...); jobs that SLURM forgot are missing.

    From `sacct` where there is accounting, else from `scontrol`, which remembers for some minutes.
    """
    wanted, found = set(jobs), {}
    if wanted and shutil.which("sacct"):
        arrays = ",".join(sorted({job.partition("_")[0] for job in wanted}))
        for line in _output("sacct", "-n", "-P", "-o", "JobID,State,NodeList", "-j", arrays).splitlines():
            job, _, state = line.partition("|")
            found[job] = state.partition("|")[0].partition(" ")[0]
    for array in sorted({job.partition("_")[0] for job in wanted - set(found)}):
        for line in _output("scontrol", "show", "job", "-o", array).splitlines():
            shown = dict(re.findall(r"(\w+)=(\S*)", line))
            job = f"{array}_{shown['ArrayTaskId']}" if "ArrayTaskId" in shown else shown.get("JobId", "")
            found.setdefault(job, shown.get("JobState", ""))
    return {job: found[job] for job in wanted if found.get(job)}


def cancel(jobs: Sequence[str]) -> None:
    """scancel these jobs and no others. Raises UserError with its words if it refuses, NoAnswer if SLURM does not answer."""
    for start in range(0, len(jobs), 200):
        try:
            done = _told(["scancel", *jobs[start : start + 200]], timeout=120)
        except subprocess.TimeoutExpired as error:
            raise NoAnswer(f"scancel does not end: nothing came in {error.timeout:.0f} s; try again later") from None
        if done.returncode:
            raise UserError(f"scancel: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")


def log_tail(log: str, lines: int = 15) -> str:
    """The last lines of a job's log."""
    try:
        return "\n".join(Path(log).read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def last_words(log: str) -> str:
    """What the log's end says of why the job ended: SLURM's own last error, or the last line."""
    lines = [line.strip() for line in log_tail(log, 40).splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(slurmstepd|srun)\S*: .*(error|oom|memory)", line, re.IGNORECASE)]
    memory = [line for line in told if "memory" in line.lower() or "oom" in line.lower()]
    return (memory or told or lines or ["nothing in its log"])[-1]


def _output(*command: str) -> str:
    """What a SLURM command prints; "" if it fails."""
    try:
        done = _told(command, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _told(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout)
