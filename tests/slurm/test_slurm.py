"""A real SLURM of one node: same numbers as without it, failures that stay where they are, and cells that go on after every kind of end.

`make test-slurm` runs these, as root where SLURM can be installed (tests/slurm/start.sh); anywhere else they are skipped with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

pytestmark = pytest.mark.slurm
HERE = Path(__file__).parent
JOB = ["launcher=slurm", "launcher.mem_gb=1.5", "launcher.time_min=10", "launcher.warning_seconds=60", "launcher.checkpoint_seconds=5.0"]

SLOW = '''\
"""dpg that sleeps before every reward: a long cell that needs no processor."""
import os
import time

from dpgbench.api import Method


class Slow(Method):
    def run(self, bench):
        from dpgbench.bench.grpo import train_policy

        def rewards(rollouts):
            time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))
            return bench.metagradients(rollouts.completions, rollouts.step).rewards

        yield from train_policy(bench, rewards)
'''
RAISES = '''\
"""Raises."""
from dpgbench.api import Method


class Raises(Method):
    def run(self, bench):
        raise ValueError("the third eye is closed")
        yield
'''
HUNGRY = '''\
"""Takes three times the memory its job has."""
import time

from dpgbench.api import Method


class Hungry(Method):
    def run(self, bench):
        taken = [b"x" * 2**20 for _ in range(4608)]
        time.sleep(60)
        yield taken
'''


@pytest.fixture(scope="module")
def slurm():
    """The cluster's environment; skipped where there can be none."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("starting a SLURM for the tests takes root and apt-get")
    started = subprocess.run(["bash", HERE / "start.sh"], capture_output=True, text=True, timeout=300)
    if started.returncode:
        pytest.skip(f"SLURM does not start here: {(started.stderr.strip() or started.stdout.strip()).splitlines()[-1]}")
    environment = os.environ | {"SLURM_CONF": started.stdout.strip().rpartition("=")[2], "OMP_NUM_THREADS": "1"}
    yield environment
    subprocess.run(["bash", HERE / "stop.sh"], check=True)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in (("slow", SLOW), ("raises", RAISES), ("hungry", HUNGRY)):
        for path, content in ((f"methods/{name}.py", text), (f"configs/method/{name}.yaml", f"name: {name}\n")):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)
    (folder / "configs" / "method" / "slow.yaml").write_text("name: slow\npolicy: ${policy}\n")
    return folder


def program(environment, *words: str, timeout: float = 600, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dpgbench", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=timeout)


def until(said: str, question, timeout: float = 420) -> str:
    """Ask until the answer is not empty."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(1)
    raise AssertionError(f"never came: {said}")


def numbers(results: Path) -> dict[str, tuple]:
    """What every cell measured, without its seconds."""
    found = {}
    for folder in sorted((results / "runs").glob("*.s[0-9]*")):
        result = json.loads((folder / "result.json").read_text())
        lines = [{key: value for key, value in line.items() if key != "seconds"} for line in result["snapshots"]]
        found[folder.name] = ((folder / "metrics.jsonl").read_bytes(), lines, result["texts"])
    return found


def log_of(results: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((results / "jobs").glob("*_log.out")))


SLOW_CELL = ["task=language", "method=slow", *SMALL[1:-1], "steps=14", "snapshots=3"]


@pytest.fixture(scope="module")
def long_cell(slurm, own, tmp_path_factory):
    """A cell of over four minutes under a time limit of two, submitted before the other tests."""
    results = tmp_path_factory.mktemp("long")
    done = program(
        slurm,
        "sweep",
        *SLOW_CELL,
        f"plugins={own}",
        f"results={results}",
        *JOB[:2],
        "launcher.time_min=2",
        "launcher.warning_seconds=20",
        JOB[-1],
        SLOW_SECONDS="17",
    )
    assert done.returncode == 0 and re.search(r"submitted 1 cells as \d+ \(one job\); logs: ", done.stdout), done.stderr
    return results


@pytest.fixture(scope="module")
def undisturbed(slurm, own, tmp_path_factory):
    """The numbers of the slow cell, run in one go without sleeping."""
    results = tmp_path_factory.mktemp("undisturbed")
    assert program(slurm, "sweep", *SLOW_CELL, f"plugins={own}", f"results={results}").returncode == 0
    return numbers(results)


def test_jobs_give_the_numbers_of_inline_cells(slurm, long_cell, tmp_path):
    """Two packed jobs of two cells each; the sweep says what it submitted, and the second time there is nothing to submit."""
    words = ["task=l2_norm", "method=base,dpg", "seed=0,1", *SMALL[1:-1], "steps=2", "snapshots=2"]
    jobs = [*JOB, "launcher.cells_per_job=2", "launcher.wait=true"]
    done = program(slurm, "sweep", *words, *jobs, f"results={tmp_path / 'slurm'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"submitted 4 cells as \d+ \(2 jobs\)", done.stdout) and done.stdout.rstrip().endswith("4 done")
    assert program(slurm, "sweep", *words, f"results={tmp_path / 'inline'}").returncode == 0
    assert numbers(tmp_path / "slurm") == numbers(tmp_path / "inline")
    again = program(slurm, "sweep", *words, *jobs, f"results={tmp_path / 'slurm'}")
    assert again.returncode == 0 and "4 of 4 cells are done already" in again.stdout and "submitted" not in again.stdout


def test_a_cell_shared_by_two_processes_gives_the_numbers_of_one(slurm, tmp_path):
    """`launcher.processes=2`: the job starts torchrun; texts and account are those of one process, and base has one process as ever."""
    words = ["task=l2_norm", "method=base,dpg", *SMALL[1:-1], "steps=2", "snapshots=2", "policy.rollout_batch=4", "policy.micro_batch=4"]
    jobs = [*JOB[:1], *JOB[2:], "launcher.mem_gb=3", "launcher.processes=2", "launcher.wait=true"]
    done = program(slurm, "sweep", *words, *jobs, f"results={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr + log_of(tmp_path)
    assert program(slurm, "sweep", *words, f"results={tmp_path / 'alone'}").returncode == 0
    ours, theirs = numbers(tmp_path), numbers(tmp_path / "alone")
    assert [texts for _, _, texts in ours.values()] == [texts for _, _, texts in theirs.values()]
    assert "torch.distributed" not in log_of(tmp_path) and len(ours) == 2


def test_failures_stay_where_they_are_and_code_is_pinned(slurm, long_cell, own, tmp_path):
    """One cell raises, one takes too much memory, both among others in one array; and the jobs run the code as it was submitted."""
    copy = tmp_path / "own"
    shutil.copytree(own, copy)
    words = ["task=l2_norm", "method=raises,hungry,base", "deployment_texts=8", f"plugins={copy}", f"results={tmp_path}"]
    done = program(slurm, "sweep", *words, *JOB)
    assert done.returncode == 0, done.stderr
    (copy / "methods" / "raises.py").write_text(RAISES.replace("third", "fourth"))
    watched = program(slurm, "status", *words, "--watch")
    states = dict(re.findall(r"^(l2_norm\.\w+)\.\S+ +(\w+)", watched.stdout, re.MULTILINE))
    assert states == {"l2_norm.raises": "failed", "l2_norm.hungry": "failed", "l2_norm.base": "done"}, watched.stdout + log_of(tmp_path)
    assert "the third eye is closed" in watched.stdout
    assert re.search(r"hungry\S+ +failed +.*memory", watched.stdout, re.IGNORECASE), watched.stdout + log_of(tmp_path)
    (raised,) = (tmp_path / "runs").glob("l2_norm.raises*")
    assert "Traceback" in (raised / "error.txt").read_text() and "code/" in (raised / "error.txt").read_text()
    assert (raised / "spec.yaml").exists()
    again = program(slurm, "sweep", *words, *JOB)
    assert again.returncode == 1 and "submitted" not in again.stdout and "retry=failed runs them again" in again.stdout


def test_cancel_stops_this_sweep_alone_and_the_next_one_completes_it(slurm, long_cell, own, undisturbed, tmp_path):
    """scancel of a running job, by hand and by `cancel`; sweeping again goes on from the checkpoint."""
    words = [*SLOW_CELL, f"plugins={own}", f"results={tmp_path}"]
    assert program(slurm, "sweep", *words, *JOB, SLOW_SECONDS="2").returncode == 0

    def checkpoint() -> str:
        return next((path.name for path in tmp_path.glob("runs/*/checkpoint.*.safetensors")), "")

    until("a checkpoint", checkpoint)
    (folder,) = (tmp_path / "runs").glob("language*")
    assert re.search(r"running +step \d+ of 14, about \d+ (s|min) left", program(slurm, "status", *words).stdout)
    subprocess.run(["scancel", json.loads((folder / "job.json").read_text())["job"]], env=slurm, check=True)
    until("the end of the job", lambda: "cancelled" in program(slurm, "status", *words).stdout.lower())
    assert program(slurm, "sweep", *words, *JOB, SLOW_SECONDS="2").returncode == 0
    cancelled = program(slurm, "cancel", *words)
    assert "stopped 0 processes and 1 jobs" in cancelled.stdout, cancelled.stderr
    queue = subprocess.run(["squeue", "-h", "-o", "%i"], env=slurm, capture_output=True, text=True).stdout.split()
    (other,) = (long_cell / "runs").glob("language*")
    if not (other / "result.json").exists():
        assert json.loads((other / "job.json").read_text())["job"] in queue, "the other sweep's job was cancelled too"
    until("the end of the job", lambda: not re.search("queued|running", program(slurm, "status", *words).stdout))
    done = program(slurm, "sweep", *words, *JOB, "launcher.wait=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(tmp_path) == undisturbed


def test_a_time_limit_is_no_limit_on_a_cell(slurm, long_cell, undisturbed):
    """Two minutes at a time, a cell of more than four: requeued with a checkpoint, and the numbers of a run in one go."""
    until("the long cell", lambda: next((str(path) for path in long_cell.glob("runs/*/result.json")), ""), timeout=600)
    log = log_of(long_cell)
    assert log.count("Requeued job") >= 2 and "timed-out" in log
    assert numbers(long_cell) == undisturbed


def test_preemption_is_no_failure(slurm, own, undisturbed, tmp_path):
    """A job of higher priority takes the whole node; the cell is requeued by SLURM and ends with the same numbers."""
    words = [*SLOW_CELL, f"plugins={own}", f"results={tmp_path}"]
    assert program(slurm, "sweep", *words, *JOB, SLOW_SECONDS="2").returncode == 0
    until("a checkpoint", lambda: next((path.name for path in tmp_path.glob("runs/*/checkpoint.*.safetensors")), ""))
    urgent = ["srun", "--partition=urgent", "--cpus-per-task=4", "--mem=100M", "true"]
    subprocess.run(urgent, env=slurm, check=True, capture_output=True, timeout=120)
    until("the cell", lambda: next((str(path) for path in tmp_path.glob("runs/*/result.json")), ""))
    log = log_of(tmp_path)
    assert "SIGTERM" in log or "preempted" in log or log.count("Starting with JobEnvironment") > 1, log
    assert log.count("Starting with JobEnvironment") > 1, log
    assert numbers(tmp_path) == undisturbed


def test_what_slurm_refuses_is_one_line(slurm, tmp_path):
    words = ["task=l2_norm", "method=base", "deployment_texts=8", f"results={tmp_path}", *JOB]
    for setting, says in (("launcher.partition=moon", "invalid partition"), ("launcher.mem_gb=900000", "memory")):
        done = program(slurm, "sweep", *[word for word in words if word.partition("=")[0] != setting.partition("=")[0]], setting)
        assert done.returncode == 2 and says in done.stderr.lower() and done.stderr.count("\n") == 1, done.stderr
    done = program(slurm, "status", *words, SLURM_CONF="/nowhere")
    assert done.returncode == 0, "no cell was given to SLURM, so it is not asked"
