"""Processes that go wrong: methods that hang, run out of memory or return NaN, killed workers, signals in the middle of a checkpoint,
clocks that run backwards, locks of other hosts, code of another version. A cell then exists once, with the numbers of a run left in peace,
and other cells of the sweep are not lost with it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY
from faults import LIGHT, metrics, nothing, numbers, pretend

from dpgbench import config
from dpgbench.core.errors import CellError, UserError
from dpgbench.core.interrupts import time_limit
from dpgbench.launch import check, local
from dpgbench.run.cell import run_cell
from dpgbench.store import checkpoints, lock
from dpgbench.store.run_folder import RunFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes")


# ---- locks, clocks, other code


def test_a_cell_of_another_host_is_left_alone_and_named(dpgbench, walk, tmp_path):
    """While its heart beats; then it is taken over, also if the clock was set back a year since."""
    words = [*walk(nothing), f"results={tmp_path / 'r'}"]
    spec = config.read(words[1:], sweep=True).cells[0].spec
    folder = RunFolder.of(tmp_path / "r", spec)
    folder.path.mkdir(parents=True)
    owner = {**lock.Owner.me().__dict__, "host": "elsewhere", "machine": "other"}
    (folder.path / "lock.1").write_text(json.dumps(owner))
    done = dpgbench(*words)
    assert done.code == 1 and re.search(r"busy \S+: another process works on this cell \(pid \d+ on elsewhere\); wait for it", done.out)
    os.utime(folder.path / "lock.1", (time.time() + 365 * 86400,) * 2)
    assert dpgbench(*words).code == 0 and folder.state().name == "done"


def test_a_clock_that_runs_backwards_changes_no_number(walk, tmp_path, monkeypatch):
    """The clock of the wall and those that should not."""
    cell = config.read(walk(nothing)[1:], sweep=True).cells[0].spec
    own = tmp_path / "own"
    assert run_cell(cell, tmp_path / "quiet", own) == "done"
    now = [2e9]

    def back(step: float = 3600.0) -> float:
        now[0] -= step
        return now[0]

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, back)
    assert run_cell(cell, tmp_path / "back", own, checkpoint_seconds=60.0) == "done"
    monkeypatch.undo()
    assert metrics(tmp_path / "back") == metrics(tmp_path / "quiet")


def test_two_codes_in_one_folder_share_no_half_cell(tmp_path, quiet):
    """What one has finished the other leaves alone; what one has begun the other begins again."""
    assert numbers(pretend(tmp_path / "done")) == numbers(pretend(tmp_path / "done", code="two")) == quiet
    folder = pretend(tmp_path / "half", until=3)
    os.link(folder.path / "metrics.jsonl", tmp_path / "begun")  # or its inode would be free for the next file
    began = (tmp_path / "begun").stat().st_ino
    assert numbers(pretend(tmp_path / "half", code="two")) == quiet and (folder.path / "metrics.jsonl").stat().st_ino != began


# ---- methods and processes that go wrong


def test_a_limit_of_time_is_one_that_can_be(monkeypatch):
    for value in ("0", "-1", "soon", "true", "inf"):
        with pytest.raises(UserError, match=r"launcher\.cell_seconds="):
            check(config.read([*LIGHT, f"launcher.cell_seconds={value}"], sweep=True).launcher)
    check(config.read([*LIGHT, "launcher.cell_seconds=0.5"], sweep=True).launcher)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="not under torchrun"):
        check(config.read([*LIGHT, "launcher.cell_seconds=0.5"], sweep=True).launcher)


def test_time_that_is_up_is_heard_once():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(CellError, match="up"), time_limit(0.05, lambda: CellError("up")):
        time.sleep(10)
    with time_limit(0.05, lambda: CellError("up")):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_method_that_hangs_fails_and_the_sweep_goes_on(dpgbench, walk, tmp_path):
    """In this process, by an alarm; with more time it goes on from its checkpoint to a quiet run's bytes."""

    def at(step, bench) -> None:
        while step == 3 and bench.spec.seed == 0:
            time.sleep(0.05)

    rest = ["seed=0,1", f"results={tmp_path / 'r'}"]
    done = dpgbench(*walk(at), *rest, "launcher.cell_seconds=10")
    assert done.code == 1 and done.out.count("done ") == 1 and "Traceback" not in done.out + done.err, done
    said = r"launcher.cell_seconds=10: the cell took longer and was stopped \(step 2\); give more time, as in launcher.cell_seconds=100 "
    assert re.search(said, done.out)
    assert dpgbench(*walk(nothing), *rest, "retry=failed").code == 0
    assert dpgbench(*walk(nothing), "seed=0,1", f"results={tmp_path / 'quiet'}").code == 0
    assert metrics(tmp_path / "r") == metrics(tmp_path / "quiet")


@pytest.mark.slow
def test_workers_that_hang_die_or_starve_cost_their_cells_alone(dpgbench, walk, tmp_path, monkeypatch):
    """Two workers, five cells: one hangs where no alarm is heard, one is killed, two ask for more memory than there is, one is well."""
    monkeypatch.setattr(local, "_context", lambda: multiprocessing.get_context("fork"))  # knows the trouble

    def at(step, bench) -> None:
        import resource

        if step != 2:
            return
        if bench.spec.seed == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
            while True:
                time.sleep(1)
        if bench.spec.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if bench.spec.seed in (2, 3):
            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, -1))
            torch.ones(1 << 34) if bench.spec.seed == 2 else bytearray(1 << 36)

    rest = ["seed=0,1,2,3,4", "launcher=local", "launcher.workers=2", f"results={tmp_path / 'r'}"]
    done = dpgbench(*walk(at), *rest, "launcher.cell_seconds=20")
    lines = {line.split(".s")[1][0]: line for line in done.out.splitlines() if re.match(r"failed \S*\.s\d\.", line)}
    assert done.code == 1 and sorted(lines) == list("0123") and "Traceback" not in done.out + done.err, done
    assert "cell_seconds=20: the cell took longer" in lines["0"] and "log.txt has where it was" in lines["0"]
    assert "killed by SIGKILL): perhaps out of memory" in lines["1"]
    assert all("out of memory (" in lines[seed] and "give the process more, or lower" in lines[seed] for seed in "23")
    (log,) = (tmp_path / "r").glob("runs/*.s0.*/log.txt")
    assert "in at" in log.read_text(), "where it hung"
    assert dpgbench(*walk(nothing), *rest, "retry=failed").code == 0
    assert dpgbench(*walk(nothing), rest[0], f"results={tmp_path / 'quiet'}").code == 0
    assert metrics(tmp_path / "r") == metrics(tmp_path / "quiet")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] . can't allocate memory: 68 GB")])
def test_want_of_memory_is_called_so(dpgbench, walk, tmp_path, error):
    def at(step, bench) -> None:
        raise error

    done = dpgbench(*walk(at), f"results={tmp_path / 'r'}")
    assert done.code == 1 and "out of memory (" in done.out and "scale.sampling_batch" in done.out and "Traceback" not in done.out


def test_phi_that_is_nan_at_one_step_stops_there(dpgbench, walk, tmp_path):
    """And with the reason mended the cell goes on from the step before."""
    done = dpgbench(*walk(lambda step, bench: float("nan") if step == 3 else None), f"results={tmp_path / 'r'}")
    assert done.code == 1 and "phi is nan at step 3; lower training.lr" in done.out and "Traceback" not in done.out + done.err
    seen = []
    assert dpgbench(*walk(lambda step, bench: seen.append(step)), f"results={tmp_path / 'r'}", "retry=failed").code == 0
    assert seen == [3, 4]
    assert dpgbench(*walk(nothing), f"results={tmp_path / 'quiet'}").code == 0
    assert metrics(tmp_path / "r") == metrics(tmp_path / "quiet")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_during_a_checkpoint_keeps_it_or_the_one_before(walk, tmp_path, monkeypatch, number):
    """Asked to stop, the checkpoint is written whole and the next one ends the run; Ctrl-C breaks it off and leaves nothing half."""
    spec, own = config.read(walk(nothing)[1:], sweep=True).cells[0].spec, tmp_path / "own"
    assert run_cell(spec, tmp_path / "quiet", own) == "done"
    inner, folder = safetensors.torch.save_file, RunFolder.of(tmp_path / "r", spec)

    def save_file(tensors, path, metadata=None):
        inner(tensors, path, metadata)
        if "checkpoint.00000002" in str(path):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)  # in the background of a shell's script it is ignored
        with pytest.raises(KeyboardInterrupt):
            run_cell(spec, tmp_path / "r", own, checkpoint_seconds=0.0)
    else:
        assert run_cell(spec, tmp_path / "r", own, checkpoint_seconds=0.0) == "interrupted"
    assert checkpoints.steps_in(folder.path) == ([1] if number == signal.SIGINT else [3, 2])
    assert folder.state().name == "interrupted" and not list(folder.path.glob(".*.partial"))
    assert run_cell(spec, tmp_path / "r", own) == "done"
    assert metrics(tmp_path / "r") == metrics(tmp_path / "quiet")


# ---- the program as a whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_interrupt_is_as_quiet_as_the_first(tmp_path, workers):
    """Ctrl-C reaches all processes of a terminal, here again and again until the program is gone: one line, and no traceback."""
    words = ["sweep", "task=language", "method=dpg", *TINY[1:], "steps=500", "seed=0,1", f"results={tmp_path}"]
    more = ["launcher=local", f"launcher.workers={workers}", "launcher.checkpoint_seconds=0.0"]
    command = [sys.executable, "-m", "dpgbench", *words, *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/checkpoint.*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.3)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in out + err and err.count("dpgbench: interrupted") == 1, (process.returncode, err)
    assert all(RunFolder(path).state().name in ("interrupted", "stale", "missing") for path in tmp_path.glob("runs/*.s*"))


@pytest.mark.slow
def test_sixty_four_open_files_are_enough(tmp_path):
    words = ["sweep", "task=language", "method=base,dpg", *TINY, f"results={tmp_path}", "launcher=local", "launcher.workers=2"]
    limit = "import resource, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
    program = f"{limit}from dpgbench.cli import main\nsys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(metrics(tmp_path)) == 2, done.stdout + done.stderr
