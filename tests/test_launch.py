"""Many processes, one results folder: nothing twice, nothing lost, and whatever goes wrong is named."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, TINY

from dpgbench import config
from dpgbench.launch import check, local
from dpgbench.launch.cell_states import standings
from dpgbench.store import code_snapshot
from dpgbench.store.run_folder import RunFolder

location = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
chaos = importlib.util.module_from_spec(location)
location.loader.exec_module(chaos)

LIGHT = ["task=l2_norm", "method=base", "deployment_texts=8"]


def start(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dpgbench", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path_pattern: str, folder, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not list(folder.glob(path_pattern)):
        assert time.monotonic() < deadline, f"no {path_pattern} came"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds workers to kill in /proc")
def test_killed_workers_cost_time_and_nothing_else(tmp_path):
    """The short version of benchmarks/chaos.py."""
    words = chaos.grid(6)
    assert chaos.sweep(words, 2, tmp_path / "quiet").wait() == 0
    told = chaos.disturb(words, 2, tmp_path / "disturbed", (3.0, 9.0), seed=1, limit=900)
    assert told["workers killed"] + told["sweeps killed"] > 0
    assert chaos.problems(words, tmp_path / "disturbed", tmp_path / "quiet") == []


def test_what_workers_import_beforehand_is_there():
    """Python's fork server says nothing of a module that it does not find."""
    assert all(importlib.util.find_spec(name) for name in local.IMPORTS)


def test_workers_have_the_environment_of_now_and_one_birth(monkeypatch):
    """A fork server is older than a sweep that follows another one in the same process; beside an accelerator nobody forks."""
    monkeypatch.setattr(local, "IMPORTS", [])
    specs = [cell.spec for cell in config.read(LIGHT, sweep=True).cells]
    for value in ("one", "two"):
        monkeypatch.setenv("DPGBENCH_TEST", value)
        with local.workers(1, specs) as processes:
            asked = [processes.schedule(os.getenv, args=(name,)).result() for name in ("DPGBENCH_TEST", "OMP_NUM_THREADS")]
        assert asked == [value, "1"]
    monkeypatch.setattr(local, "ACCELERATORS", (os.devnull,))
    assert local._context().get_start_method() == "spawn"


def test_a_cells_leftovers_go():
    class Trainer:
        pass

    trainer = Trainer()
    trainer.itself, gone = trainer, weakref.ref(trainer)
    del trainer
    local.give_memory_back()
    assert gone() is None


@pytest.mark.slow
def test_two_workers_run_the_cells_of_a_sweep(dpgbench, tmp_path):
    """With their progress told by the process that started them."""
    done = dpgbench("sweep", *LIGHT, "seed=0,1", "launcher=local", "launcher.workers=2", f"results={tmp_path}")
    assert done.code == 0 and done.out.count("done   l2_norm base") == 2
    assert len(list(tmp_path.glob("runs/*/log.txt"))) == len(list(tmp_path.glob("runs/*/result.json"))) == 2


@pytest.mark.slow
def test_two_sweeps_at_once_run_no_cell_twice(tmp_path):
    """A plug-in counts its runs: six cells, two sweeps of two workers each, six runs."""
    own = tmp_path / "own"
    (own / "methods").mkdir(parents=True)
    (own / "configs" / "method").mkdir(parents=True)
    (own / "methods" / "counted.py").write_text(
        '"""Counts its runs."""\nimport os\nimport time\nfrom pathlib import Path\n\nfrom dpgbench.api import Method, Snapshot\n\n\n'
        "class Counted(Method):\n    def run(self, bench):\n"
        f"        (Path({str(tmp_path)!r}) / f'run.{{bench.spec.seed}}.{{os.getpid()}}.{{time.time_ns()}}').touch()\n"
        "        time.sleep(1)\n"
        "        yield Snapshot(0, lambda prompts: ['a'] * len(prompts))\n"
    )
    (own / "configs" / "method" / "counted.yaml").write_text("name: counted\n")
    words = ["sweep", "task=l2_norm", "method=counted", "deployment_texts=8", "seed=0,1,2,3,4,5", f"plugins={own}", f"results={tmp_path}"]
    both = [start(*words, "launcher=local", "launcher.workers=2") for _ in range(2)]
    for process in both:
        process.communicate(timeout=300)
    assert sorted(path.name.split(".")[1] for path in tmp_path.glob("run.*")) == list("012345")
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 6


def test_failed_cells_wait_to_be_asked_for(dpgbench, plugins, tmp_path):
    """A sweep names them and goes on with the rest; retry=failed runs them; `launcher=debug` shows the traceback."""
    mended = tmp_path / "mended"
    (plugins / "methods" / "bad.py").write_text(
        '"""Fails until a file is there."""\nfrom pathlib import Path\n\nfrom dpgbench.api import Method, Snapshot\n\n\n'
        "class Bad(Method):\n    def run(self, bench):\n"
        f"        1 / Path({str(mended)!r}).exists()\n"
        "        yield Snapshot(0, lambda prompts: ['a'] * len(prompts))\n"
    )
    (plugins / "configs" / "method" / "bad.yaml").write_text("name: bad\n")
    words = ["task=l2_norm", "method=bad", "deployment_texts=8", f"plugins={plugins}", f"results={tmp_path / 'r'}"]
    with pytest.raises(ZeroDivisionError):  # Python's own traceback and exit code 1
        dpgbench("sweep", *words, "launcher=debug")
    mended.touch()
    again = dpgbench("sweep", *words)
    assert again.code == 1 and "ZeroDivisionError" in again.out and "retry=failed runs it again" in again.out
    assert dpgbench("sweep", *words, "retry=sometimes").code == 2
    assert dpgbench("sweep", *words, "retry=failed").code == 0


def test_damaged_cells_are_named_and_the_others_run(dpgbench, finished):
    """Every file of a done cell that can be damaged: named, not read as done, run again when asked."""
    words = ["task=l2_norm", "method=base", "seed=0,1", *TINY, f"results={finished}"]
    first, second = sorted((finished / "runs").glob("l2_norm.base.s[01].*"))
    (first / "result.json").write_text("")
    shutil.rmtree(second)
    done = dpgbench("sweep", *words)
    assert done.code == 1 and re.search(r"damaged \S+\.s0\.\S+: result.json is not valid JSON", done.out)
    assert "done   l2_norm base seed 1" in done.out and (first / "result.json").read_text() == ""
    assert dpgbench("sweep", *words, "retry=damaged").code == 0
    assert dpgbench("report", *words).code == 0
    parquet = finished / "sweep.parquet"
    parquet.write_bytes(parquet.read_bytes()[:1000])
    shutil.rmtree(finished / "runs")
    done = dpgbench("report", *words)
    assert done.code == 2 and "cannot be read as parquet" in done.err and done.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_ends_in_one_line_and_goes_on_when_there_is_space(dpgbench, tmp_path):
    """Full in the middle of a cell: no done that is none; with space again the same line ends with the numbers of a quiet run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system here")
    words = ["task=language", "method=dpg", *SMALL[1:-1], "steps=4", "snapshots=2", "launcher.checkpoint_seconds=0.0"]
    try:
        full = dpgbench("sweep", *words, f"results={disk}")  # a checkpoint takes 2.4 MB
        assert full.code == 2 and "No space left" in full.err and full.err.count("\n") == 1, full.err
        assert re.search(r"language_de\.dpg\.\S+ +interrupted", dpgbench("status", f"results={disk}").out)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert dpgbench("sweep", *words, f"results={disk}").code == 0
        assert dpgbench("sweep", *words, f"results={tmp_path / 'quiet'}").code == 0
        assert chaos.numbers(disk) == chaos.numbers(tmp_path / "quiet")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_cancel_stops_a_local_sweep_which_keeps_its_checkpoint(dpgbench, tmp_path):
    """Only the named one, and as kindly as a time limit would."""
    words = ["task=language", "method=dpg", *SMALL[1:-1], "steps=500", "snapshots=2", "seed=0,1", f"results={tmp_path}"]
    in_workers = ["launcher=local", "launcher.workers=2", "launcher.checkpoint_seconds=0.0"]
    process = start("sweep", *words, *in_workers, "name=mine")
    try:
        wait_for("runs/*/checkpoint.*", tmp_path)
        assert "stopped 0 processes" in dpgbench("cancel", *words, "name=other").out
        assert process.poll() is None
        assert "stopped 1 processes" in dpgbench("cancel", "name=mine", f"results={tmp_path}").out
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130 and "interrupted" in err
    finally:
        process.kill()
    assert re.search(r"interrupted|stale", dpgbench("status", f"results={tmp_path}").out)


def test_a_finished_cell_costs_the_same_however_many_there_are(dpgbench, tmp_path, monkeypatch):
    """--dry-run and status open a finished cell's result and the metrics whose lines it counted, each at most three times
    (the seconds of 20,000 cells are in benchmarks/growth.py)."""
    words = ["task=all", "method=dpg,base", "seed=0,1", f"results={tmp_path}"]
    names = [cell.spec.folder for cell in config.read(words, sweep=True).cells]
    for name in names:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("{}\n" * 60)
        result = {"schema": 1, "hash": name.rpartition(".")[2], "lines": 60, "snapshots": [], "seconds_total": 9.0}
        (folder / "result.json").write_text(json.dumps(result))
    opened, inner = Counter(), io.open

    def spy(file, *rest, **named):
        if isinstance(file, (str, Path)) and str(file).startswith(str(tmp_path / "runs")):
            opened[Path(file).name] += 1
        return inner(file, *rest, **named)

    monkeypatch.setattr(io, "open", spy)
    monkeypatch.setattr("builtins.open", spy)
    for command in (["sweep", *words, "--dry-run"], ["status", *words], ["status", f"results={tmp_path}"]):
        opened.clear()
        done = dpgbench(*command)
        assert done.code == 0 and done.out.count("done") >= len(names)
        assert set(opened) == {"result.json", "metrics.jsonl"} and max(opened.values()) <= 3 * len(names)


def test_slurm_that_is_not_there_is_one_line(dpgbench, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    done = dpgbench("sweep", *LIGHT, "launcher=slurm", f"results={tmp_path}")
    assert done.code == 2 and "there is no sbatch on this machine" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "words"), [("yaml", ["list"]), ("omegaconf", ["sweep", *LIGHT]), ("submitit", ["sweep", *LIGHT, "launcher=slurm"])]
)
def test_a_package_that_is_missing_is_one_line(tmp_path, module, words):
    """As on a node whose environment was never installed."""
    (tmp_path / "bin").mkdir()
    for program in ("sbatch", "squeue", "scancel", "srun"):
        (tmp_path / "bin" / program).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / program).chmod(0o755)
    code = (
        f"import sys; sys.modules[{module!r}] = None\nfrom dpgbench.cli import main\n"
        f"sys.exit(main({[*words, f'results={tmp_path}'] if words != ['list'] else words!r}))"
    )
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and module in done.stderr and "pip install" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_settings_of_launchers_are_checked():
    from dpgbench.core.errors import UserError

    for words in (["launcher=local", "launcher.workers=0"], ["launcher.checkpoint_seconds=-1.0"]):
        with pytest.raises(UserError, match="launcher"):
            check(config.read([*LIGHT, *words], sweep=True).launcher)


def test_resources_by_scale_and_method():
    """default, then the scale's, then the method's, then what the line says for all."""
    from dpgbench.launch.slurm import _resources

    words = ["launcher=slurm", "launcher.resources.dpg.mem_gb=64", "launcher.gpus=2"]
    launcher = config.read([*LIGHT, *words], sweep=True).launcher
    assert _resources(launcher, "tiny", "base") == {"gpus": 2, "cpus": 1, "mem_gb": 4, "time_min": 120}
    assert _resources(launcher, "small", "dpg") == {"gpus": 2, "cpus": 4, "mem_gb": 64, "time_min": 480}


def test_pinned_code_is_a_copy_that_shows_when_it_was_changed(tmp_path, plugins):
    """The same content is found again, other content lies elsewhere, and a changed copy is refused."""
    from dpgbench.core.errors import UserError

    there = code_snapshot.pin(tmp_path, plugins, "abc")
    assert code_snapshot.pin(tmp_path, plugins, "abc") == there and (there / "COMMIT").read_text() == "abc"
    assert list((there / "dpgbench" / "worlds" / "phrasebook").rglob("*.safetensors"))
    before = code_snapshot.digest(plugins)
    (plugins / "methods" / "parrot.py").write_text((plugins / "methods" / "parrot.py").read_text() + "\n# changed\n")
    assert code_snapshot.pin(tmp_path, plugins, "abc") != there and code_snapshot.digest(plugins) != before
    (there / "dpgbench" / "core" / "seeds.py").write_text("# changed")
    with pytest.raises(UserError, match="changed since it was pinned"):
        code_snapshot.verify(there)


def test_a_worker_that_was_told_to_stop_before_it_worked_is_gone():
    """The signal's default is not what a pool's worker does: idle it ends, at work it finishes its step."""
    code = (
        "import os, signal\nfrom dpgbench.core.interrupts import Stop\nStop.install()\nos.kill(os.getpid(), signal.SIGTERM)\nprint('here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM and not done.stdout


def test_a_state_names_the_folder_of_another_version(tmp_path):
    folder = RunFolder(tmp_path / "task.method.s0.0123456789")
    folder.path.mkdir()
    (folder.path / "result.json").write_text(json.dumps({"schema": 0, "hash": folder.hash, "snapshots": [], "lines": 0}))
    assert folder.state().name == "damaged" and "another version" in folder.state().detail


# ---- many writers


def test_many_at_once_ask_whether_they_may_write_and_write_the_same_name(tmp_path):
    """Processes that start together, and threads of one, which share a pid: nobody takes another's temporary file away."""
    from concurrent.futures import ThreadPoolExecutor

    from dpgbench.core.files import write_atomically
    from dpgbench.store.run_folder import check_writable

    def write(number: int) -> None:
        check_writable(tmp_path)
        write_atomically(tmp_path / "one", bytes([number]) * 100_000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    assert len(set((tmp_path / "one").read_bytes())) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["one", "runs"]


def test_an_owner_sweeps_up_what_a_killed_one_was_writing(tmp_path):
    spec = config.read(LIGHT, sweep=False).cells[0].spec
    folder = RunFolder.of(tmp_path, spec)
    folder.path.mkdir(parents=True)
    (folder.path / ".checkpoint.3.safetensors.0123.partial").write_bytes(b"half")
    folder.begin({})
    assert not list(folder.path.glob(".*.partial"))


def test_cancel_knows_a_sweep_from_one_whose_name_begins_alike(tmp_path):
    from dpgbench.launch import local_sweeps

    with local_sweeps.announced(tmp_path, "mine.1"):
        assert local_sweeps.stop(tmp_path, "mine") == local_sweeps.stop(tmp_path, "*") == ([], [])
        assert len(list((tmp_path / "runs").glob("mine.1.*.running.json"))) == 1


# ---- paths of jobs


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """A folder with files of every kind a setting may name, to work in."""
    from dpgbench.worlds import phrasebook

    (tmp_path / "mine.txt").write_text("\n".join(f"der König sieht {number} Häuser" for number in range(40)), encoding="utf-8")
    shutil.copytree(phrasebook.WEIGHTS / "generator", tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_gets_whole_paths_of_all_a_users_files(own_files, plugins):
    """It starts in another folder; the cell is the same there, and what is the hub's or embedded keeps its name."""
    from dpgbench.api import RunSpec
    from dpgbench.launch import slurm

    text = (plugins / "methods" / "parrot.py").read_text(encoding="utf-8")
    (plugins / "methods" / "reader.py").write_text(text.replace("Parrot", "Reader"), encoding="utf-8")
    (plugins / "configs" / "method" / "reader.yaml").write_text("name: reader\nfile: mine.txt\n", encoding="utf-8")
    files = ["task.file=mine.txt", "scale.corpus=mine.txt", "scale.generator=models/mine", "scale.target=models/mine"]
    request = config.read(["task=language", "method=reader", *files, f"plugins={plugins}", "launcher=slurm"], sweep=True)
    spec = request.cells[0].spec
    (job,) = slurm._job([spec], request.launcher, own_files / "r", own_files / "code").cells
    whole = [job["task"]["file"], job["method"]["file"], *(job["scale"][name] for name in ("corpus", "generator", "target"))]
    model = str(own_files / "models" / "mine")
    assert whole == [str(own_files / "mine.txt")] * 3 + [model] * 2
    assert RunSpec(job).hash == spec.hash and RunSpec(job).folder == spec.folder
    named = config.read(["scale.corpus=some/texts", "scale.target=some/model", "launcher=slurm"], sweep=True)
    (job,) = slurm._job([named.cells[0].spec], named.launcher, own_files, own_files).cells
    assert [job["scale"][name] for name in ("corpus", "generator", "target")] == ["some/texts", "phrasebook", "some/model"]


@pytest.mark.parametrize("name", ["it's", 'a"b', "$HOME", "a;b", "(x)&", "ä#ö", "`id`", "-n"])
def test_a_jobs_script_quotes_its_path(name, tmp_path):
    from dpgbench.launch import slurm

    code = tmp_path / name / "code"
    launcher = config.read([*LIGHT, "launcher=slurm"], sweep=True).launcher
    setup = slurm._parameters(launcher, slurm._resources(launcher, "tiny", "base"), code, "x")["setup"]
    done = subprocess.run(["bash", "-c", "\n".join([*setup, 'printf %s "$PYTHONPATH"'])], capture_output=True, timeout=20)
    assert done.stdout == os.fsencode(code) and not done.stderr


@pytest.mark.parametrize("name", ["a:b", "a b", "50%", "a\\b", "a\nb"])
def test_a_path_that_cannot_be_quoted_is_refused_before_the_code_is_copied(name, tmp_path):
    from dpgbench.core.errors import UserError
    from dpgbench.launch import slurm

    request = config.read([*LIGHT, "launcher=slurm"], sweep=True)
    with pytest.raises(UserError, match="PYTHONPATH reads a colon" if ":" in name else "SLURM reads"):
        slurm.submit([request.cells[0].spec], request.launcher, tmp_path / name, None, "x", "")
    assert not (tmp_path / name).exists()


# ---- what SLURM says, or does not


@pytest.fixture
def says(tmp_path, monkeypatch):
    """Puts a shell script in the place of one of SLURM's commands; its arguments are lines of bin/<command>.calls."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def put(command: str, script: str):
        path, calls = tmp_path / "bin" / command, tmp_path / "bin" / f"{command}.calls"
        path.write_text(f'#!/bin/sh\necho "$@" >>{calls}\n{script}\n')
        path.chmod(0o755)
        return calls

    put("squeue", "true")
    put("sacct", "false")
    put("scontrol", "false")
    return put


def begun(results, job: str, seed: int = 0) -> RunFolder:
    """A cell that a job has begun and nobody owns."""
    spec = config.read([*LIGHT, f"seed={seed}", f"results={results}"], sweep=False).cells[0].spec
    folder = RunFolder.of(results, spec)
    folder.path.mkdir(parents=True)
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder.path / "job.json").write_text(json.dumps({"job": job, "sweep": "sweep", "log": f"/jobs/{job}_0_log.out"}))
    return folder


@pytest.mark.parametrize(
    ("end", "state"),
    [("FAILED", "failed"), ("OUT_OF_MEMORY", "failed")]
    + [
        (end, "interrupted") for end in ("CANCELLED by 0", "NODE_FAIL", "RUNNING", "PENDING", "COMPLETING", "REQUEUE_HOLD", "SUSPENDED", "")
    ],
)
def test_only_an_end_of_its_own_doing_fails_a_cell(says, tmp_path, end, state):
    """A cell is not failed for what a cluster does, nor because accounting still calls a job running that has left the queue."""
    folder = begun(tmp_path, "7_0")
    says("sacct", f"echo '7_0|{end}|node1'")
    (found,) = standings([folder], settle=True)
    assert found.name == state and (folder.path / "error.txt").exists() == (state == "failed"), found


def test_without_accounting_an_array_is_asked_for_once(says, tmp_path):
    """A waiting sweep asks every two seconds, and hundreds of its jobs may have ended."""
    folders = [begun(tmp_path, f"7_{seed}", seed) for seed in range(3)] + [begun(tmp_path, "9", 3)]
    line = "JobId={} ArrayJobId=7 ArrayTaskId={} JobName=x JobState={} Reason=None"
    array = [line.format(11, 0, "FAILED"), line.format(12, 1, "CANCELLED"), line.format(7, "3-9%4", "PENDING")]
    printed = " ".join(f"'{one}'" for one in array)
    cases = f"case $4 in 7) printf '%s\\n' {printed};; 9) echo 'JobId=9 JobName=x JobState=NODE_FAIL';; esac"
    calls = says("scontrol", cases)
    details = [state.detail for state in standings(folders)]
    assert "ended FAILED" in details[0] and "ended CANCELLED" in details[1] and "is gone" in details[2] and "ended NODE_FAIL" in details[3]
    assert calls.read_text().splitlines() == ["show job -o 7", "show job -o 9"]


def test_who_waits_outlasts_a_controller_that_is_away(says, tmp_path, dpgbench, monkeypatch):
    """It is restarted, say: the jobs go on without it, and so does who waits for them. Asked once, it is one line."""
    from dpgbench.cli import status

    begun(tmp_path, "7_0")
    away = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    calls = says("squeue", f'[ "$(wc -l <{tmp_path}/bin/squeue.calls)" -gt 3 ] || {{ {away}; }}')
    words = ["status", *LIGHT, f"results={tmp_path}"]
    monkeypatch.setattr(status, "WATCH_SECONDS", 0.01)
    done = dpgbench(*words)
    assert done.code == 2 and "Unable to contact slurm controller" in done.err and done.err.count("\n") == 1
    done = dpgbench(*words, "--watch")
    assert done.code == 0 and done.out.count("asking again") == 1 and "interrupted" in done.out
    assert len(calls.read_text().splitlines()) > 4
    says("squeue", away)
    monkeypatch.setattr(status, "PATIENCE_SECONDS", 0.05)
    done = dpgbench(*words, "--watch")
    assert done.code == 2 and done.err.count("\n") == 1


def test_a_controller_that_hangs_is_one_that_does_not_answer(monkeypatch):
    from dpgbench.launch import slurm

    def hang(command, timeout):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(slurm, "_told", hang)
    for asked in (slurm.queue, lambda: slurm.cancel(["7_0"])):
        with pytest.raises(slurm.NoAnswer, match="nothing came in"):
            asked()
    assert slurm.ends(["7_0"]) == {}


def test_a_job_that_was_killed_as_it_wrote_itself_down_writes_itself_down(tmp_path, monkeypatch):
    """submitit's own code around `Job.checkpoint`, with the file that a first, killed attempt leaves."""
    from submitit.core import job_environment
    from submitit.core.utils import DelayedSubmission

    from dpgbench.launch.slurm_job import Job

    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path), "SLURM_JOB_ID": "12"}.items():
        monkeypatch.setenv(name, value)
    job = DelayedSubmission(Job([], str(tmp_path), None, str(tmp_path), 60.0, 1.0))
    job.set_timeout(10, 5)
    (tmp_path / "12_submitted.pkl").write_bytes(b"as it was")
    (tmp_path / "12_submitted.pkl.save_tmp").write_bytes(b"half")
    assert job_environment._checkpoint(job, tmp_path / "12_submitted.pkl", 4) == ""
    assert DelayedSubmission.load(tmp_path / "12_submitted.pkl").function.results == str(tmp_path)
