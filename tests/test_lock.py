"""One owner per cell: told alive from dead by process, boot, job and heartbeat, and never two at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from dpgbench.core.errors import Busy, Lost
from dpgbench.store import lock
from dpgbench.store.run_folder import RunFolder


def leave(folder, n=1, *, age=0.0, **changes) -> None:
    """The lock file of another owner, last touched `age` seconds ago."""
    owner = replace(lock.Owner.me(), token="somebody", **changes)
    path = folder / f"lock.{n}"
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age,) * 2)


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


ALIVE = {
    "this very process": {},
    "another host whose heart beats": {"host": "elsewhere", "machine": "other", "age": lock.STALE_SECONDS / 2},
}
DEAD = {
    "its process is gone": {"pid": "ended"},
    "its pid is another process's now": {"started": "1"},
    "another host whose heart stopped": {"host": "elsewhere", "machine": "other", "age": lock.STALE_SECONDS * 2},
    "this host before it was booted": {"machine": "earlier boot", "age": lock.STALE_SECONDS * 2},
}


@pytest.mark.parametrize("name", ALIVE)
def test_a_living_owner_is_respected(tmp_path, name):
    leave(tmp_path, **ALIVE[name])
    assert lock.look(tmp_path).alive
    with pytest.raises(Busy, match=r"another process works on this cell .*pid"):
        lock.Lock(tmp_path).take()
    assert sorted(os.listdir(tmp_path)) == ["lock.1"]


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_owner_is_taken_over(tmp_path, name):
    changes = {key: ended_process() if value == "ended" else value for key, value in DEAD[name].items()}
    leave(tmp_path, **changes)
    assert RunFolder(tmp_path).state().name == "stale"
    mine = lock.Lock(tmp_path)
    assert mine.take().owner is not None
    assert sorted(os.listdir(tmp_path)) == ["lock.2"] and lock.look(tmp_path).owner == mine.owner
    mine.release()
    assert sorted(os.listdir(tmp_path)) == ["lock.2.free"] and lock.look(tmp_path).owner is None


def test_a_job_that_slurm_starts_again_elsewhere_need_not_wait(tmp_path, monkeypatch):
    """Its earlier start is over, whatever the heartbeat says; another job's is not."""
    for name, value in {"JOB_ID": "8", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    leave(tmp_path, host="elsewhere", machine="other", job="7_2")
    with pytest.raises(Busy, match="job 7_2"):
        lock.Lock(tmp_path).take()
    leave(tmp_path, host="elsewhere", machine="other", job="7_1")
    mine = lock.Lock(tmp_path)
    mine.take()
    mine.release()


def test_who_was_taken_for_dead_writes_nothing_more(tmp_path):
    """A process that slept through its own take-over stops before the next line, and its release leaves the new owner's lock alone."""
    from dpgbench import config

    spec = config.read(["task=l2_norm", "method=base"], sweep=False).cells[0].spec
    folder = RunFolder.of(tmp_path, spec)
    with pytest.raises(Lost, match="taken over"), folder.owned():
        folder.append({"step": 1}, 0.0)
        leave(folder.path, n=2)
        for write in (folder.begin, folder.fail):
            with pytest.raises(Lost):
                write({} if write == folder.begin else "reason")
        folder.append({"step": 2}, 0.0)
    assert (folder.path / "metrics.jsonl").read_text().count("\n") == 1
    assert lock.look(folder.path).owner.token == "somebody"


@pytest.mark.parametrize("number", ["3", "2.free"])
def test_a_number_that_was_used_is_never_used_again(tmp_path, number):
    """The slow process: it saw a dead owner of 1, and meanwhile 2 came and went, and perhaps 3 came. Its own 2 does not count."""
    leave(tmp_path, n=number)
    slow = lock.Lock(tmp_path)
    found = lock.Held(1, replace(lock.Owner.me(), pid=1, started="0"))
    original, lock._look = lock._look, lambda folder, now: found
    try:
        with pytest.raises(Busy, match="was first"):
            slow.take()
    finally:
        lock._look = original
    assert sorted(os.listdir(tmp_path)) == [f"lock.{number}"]


def _take_turns(folder, until: float, dies: bool) -> None:
    """Take the lock over and over; inside, two processes would find each other's mark."""
    while time.time() < until:
        mine = lock.Lock(folder)
        try:
            mine.take()
        except Busy:
            continue
        with open(folder / "mark", "x") as mark:  # fails if another owner is inside
            mark.write(mine.owner.token)
        with open(folder / "turns", "a") as turns:
            turns.write("1\n")
        (folder / "mark").unlink()
        if dies:  # with the lock in hand
            os._exit(9)
        mine.release()


@pytest.mark.slow
def test_many_processes_never_own_it_together(tmp_path):
    """Six at a time for three seconds, some dying with the lock in hand and replaced."""
    context, until = multiprocessing.get_context("fork"), time.time() + 3
    running = [context.Process(target=_take_turns, args=(tmp_path, until, number < 2)) for number in range(6)]
    for process in running:
        process.start()
    codes = []
    while running:
        process = running.pop(0)
        process.join()
        codes.append(process.exitcode)
        if process.exitcode == 9 and time.time() < until:
            running.append(context.Process(target=_take_turns, args=(tmp_path, until, True)))
            running[-1].start()
    assert set(codes) <= {0, 9} and 9 in codes
    assert (tmp_path / "turns").read_text().count("\n") > 20


def test_a_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    mine = lock.Lock(tmp_path)
    mine.take()
    os.utime(mine.path, (1, 1))
    time.sleep(0.5)
    assert lock.look(tmp_path).age < 60
    mine.release()


def test_a_damaged_lock_is_judged_by_its_heartbeat(tmp_path):
    (tmp_path / "lock.1").write_text("{")
    with pytest.raises(Busy, match="unknown host"):
        lock.Lock(tmp_path).take()
    os.utime(tmp_path / "lock.1", (1, 1))
    mine = lock.Lock(tmp_path)
    mine.take()
    mine.release()
