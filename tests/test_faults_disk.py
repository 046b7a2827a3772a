"""Writes that fail: a disk that is full, read-only or broken, a process killed in mid-write, a folder that vanishes under a running cell.
A program that can still speak says in one line what is wrong and what to do; whatever was lost, the same command then ends with the numbers
of a run left in peace.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
from faults import LIGHT, SPEC, Disk, is_one_line, metrics, nothing, numbers, pretend, system_error

from dpgbench.core.errors import Gone
from dpgbench.store.checkpoints import write_tensors
from dpgbench.store.run_folder import RunFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes")


@pytest.fixture
def disk(monkeypatch, tmp_path) -> Disk:
    return Disk(monkeypatch, tmp_path)


# ---- every write fails once


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EIO"])
def test_a_write_that_fails_leaves_a_cell_that_goes_on(disk, quiet, tmp_path, name):
    """Each write of a cell in turn, half done: the system's error passes through, and the next run ends with a quiet run's bytes."""
    pretend(tmp_path / "count")
    total = disk.count
    assert total >= 40
    for at in range(1, total + 1):
        results = tmp_path / str(at)
        disk.failing(at, system_error(getattr(errno, name)))
        try:
            pretend(results)
        except OSError as error:
            assert error.errno == getattr(errno, name)
        else:
            assert at >= total - 1, "only letting go may fail unheard"
        disk.failing(0, None)
        assert numbers(pretend(results)) == quiet, f"write {at} of {total}"


def in_a_fork(do) -> int:
    """Do something in a process of its own; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_leaves_a_cell_that_goes_on(disk, quiet, tmp_path, every):
    """SIGKILL in the middle of each write of a cell: nothing that is done is not, nothing that is half is read as whole."""
    pretend(tmp_path / "count")
    for at in range(1, disk.count + 1, every):
        results = tmp_path / str(at)
        disk.failing(at, lambda path: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_fork(lambda results=results: pretend(results)) == -signal.SIGKILL
        disk.failing(0, None)
        assert RunFolder.of(results, SPEC).state().name in ("missing", "stale", "interrupted", "done")
        assert numbers(pretend(results)) == quiet, f"killed at write {at}"


# ---- a whole sweep, and what the system's errors are called


def fails_at_writes(dpgbench, disk, walk, tmp_path, which) -> None:
    words = walk(nothing)
    assert dpgbench(*words, f"results={tmp_path / 'quiet'}").code == 0  # it also writes what Python keeps of the plug-in
    disk.failing(0, None)
    assert dpgbench(*words, f"results={tmp_path / 'count'}").code == 0
    total = disk.count
    for at in which(total):
        results = tmp_path / f"r{at}"
        done = dpgbench(*words, f"results={results}") if disk.failing(at, system_error(errno.ENOSPC)) else None
        assert done.code == 2 or (done.code == 0 and at >= total - 2), at
        if done.code:
            is_one_line(done, 2, "No space left", "free some space")
        disk.failing(0, None)
        assert dpgbench(*words, f"results={results}").code == 0
        assert metrics(results) == metrics(tmp_path / "quiet")


def test_a_sweep_on_a_full_disk_says_one_line(dpgbench, disk, walk, tmp_path):
    """At one of its writes; the same line then ends with a quiet run's bytes."""
    fails_at_writes(dpgbench, disk, walk, tmp_path, lambda total: [total // 2])


@pytest.mark.slow
def test_a_sweep_on_a_full_disk_says_one_line_at_every_third_write(dpgbench, disk, walk, tmp_path):
    fails_at_writes(dpgbench, disk, walk, tmp_path, lambda total: range(1, total + 1, 3))


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("ENOSPC", "free some space"), ("EDQUOT", "free some space"), ("EROFS", "writable"), ("EACCES", "writable"), ("EPERM", "writable"),
        ("EIO", "whether its disk is well"), ("ESTALE", "whether its disk is well"), ("ENOTDIR", "move away"), ("EEXIST", "move away"),
        ("ELOOP", "move away"), ("EMFILE", "ulimit -n"), ("ENFILE", "ulimit -n"), ("ENAMETOOLONG", "shorter"), ("ENOMEM", "workers"),
    ],
)  # fmt: skip
def test_an_error_of_the_system_is_one_line_with_its_fix(dpgbench, monkeypatch, tmp_path, name, fix):
    from dpgbench.launch import local_sweeps

    monkeypatch.setattr(local_sweeps, "write_atomically", lambda path, content: system_error(getattr(errno, name))(path))
    is_one_line(dpgbench("sweep", *LIGHT, f"results={tmp_path}"), 2, os.strerror(getattr(errno, name)), fix, str(tmp_path))


def test_safetensors_hides_no_full_disk(tmp_path):
    """Its own exception, with the system's number in a text, is the system's error again."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as told:
        write_tensors(tmp_path / "folder" / ("x" * 250), {"a": torch.ones(3)})
    assert told.value.errno == errno.ENAMETOOLONG


# ---- a results folder that changes under a running cell

CHANGES = {
    "its folder is deleted": lambda results, run: shutil.rmtree(run),
    "its folder is replaced by a file": lambda results, run: (shutil.rmtree(run), run.write_text("")),
    "all results are deleted": lambda results, run: shutil.rmtree(results),
    "results is a file now": lambda results, run: (shutil.rmtree(results), results.write_text("")),
    "results leads elsewhere now": lambda results, run: (results.rename(f"{results}.old"), results.symlink_to(run.parents[2] / "empty")),
    "results leads nowhere now": lambda results, run: (results.rename(f"{results}.old"), results.symlink_to(run.parents[2] / "nowhere")),
}


USUAL = ("its folder is deleted", "results is a file now", "results leads elsewhere now")


@pytest.mark.parametrize("name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES])
def test_a_folder_that_vanishes_is_named(dpgbench, walk, tmp_path, name):
    """One line, no traceback; with the folder as it should be the same line ends as ever."""
    results = tmp_path / "r"
    (tmp_path / "empty").mkdir()

    def at(step, bench) -> None:
        if step == 3:
            CHANGES[name](results, bench.tracking.parent)

    done = dpgbench(*walk(at), f"results={results}")
    assert done.code == 1 and "Traceback" not in done.out + done.err, done
    assert re.search(r"gone \S+: deleted or replaced while the cell ran; leave it alone, and the same command runs", done.out)
    words = [*walk(nothing), f"results={results}"]
    if name in ("its folder is replaced by a file", "results is a file now", "results leads nowhere now"):
        is_one_line(dpgbench(*words), 2, str(results))
        taken = results if not name.startswith("its") else next((results / "runs").glob("*.s0.*"))
        taken.unlink()
    assert dpgbench(*words).code == 0 and len(metrics(results)) == 1


def test_who_lost_its_folder_writes_nothing(tmp_path):
    folder = RunFolder.of(tmp_path, SPEC)
    with pytest.raises(Gone), folder.owned():
        shutil.rmtree(tmp_path / "runs")
        folder.append({"step": 1}, 0.0)
    assert not (tmp_path / "runs").exists()


# ---- a real file system


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_disks_of_many_sizes_and_one_that_becomes_read_only(dpgbench, walk, tmp_path):
    """A real file system: whatever size it is full at, one line; made larger, or writable again, the same line ends as a quiet run."""
    there = tmp_path / "disk"
    there.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", there], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system here")
    try:
        assert dpgbench(*walk(nothing), f"results={tmp_path / 'quiet'}").code == 0
        said = set()
        for size in ("4k", "32k", "64k", "72k", "80k", "88k", "96k", "112k"):
            subprocess.run(["mount", "-o", f"remount,size={size}", there], check=True)
            done = dpgbench(*walk(nothing), f"results={there / size}")
            said.add(done.code)
            if done.code:
                is_one_line(done, 2, "No space left", "free some space")
            subprocess.run(["mount", "-o", "remount,size=64m", there], check=True)
            assert dpgbench(*walk(nothing), f"results={there / size}").code == 0
            assert metrics(there / size) == metrics(tmp_path / "quiet")
            shutil.rmtree(there / size)

        def at(step, bench) -> None:
            if step == 3:
                subprocess.run(["mount", "-o", "remount,ro", there], check=True)

        assert said == {0, 2}
        is_one_line(dpgbench(*walk(at), f"results={there / 'r'}"), 2, "Read-only file system", "make it writable")
        is_one_line(dpgbench(*walk(at), f"results={there / 'r'}"), 2, "cannot write there (Read-only file system)")
        subprocess.run(["mount", "-o", "remount,rw", there], check=True)
        assert dpgbench(*walk(nothing), f"results={there / 'r'}").code == 0
        assert metrics(there / "r") == metrics(tmp_path / "quiet")
    finally:
        subprocess.run(["umount", there], check=True)
