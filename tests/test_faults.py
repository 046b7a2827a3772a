"""Under fire: disks that fill up, files that rot, processes that die. A cell then exists once, with the numbers of a run left in peace.

Most faults hit `pretend`, which writes whatever a cell writes and computes nothing, so that each of its writes can fail in turn.
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY
from frames import small_frame

from dpgbench import config
from dpgbench.core.errors import CellError, Gone, UserError
from dpgbench.core.files import write_atomically
from dpgbench.core.interrupts import time_limit
from dpgbench.launch import check, local
from dpgbench.run.cell import run_cell
from dpgbench.store import checkpoints, lock, parquet
from dpgbench.store.checkpoints import Checkpoints, write_tensors
from dpgbench.store.run_folder import CHECKED, GROWING, RunFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes")
LIGHT = ["task=l2_norm", "method=base", "deployment_texts=8", "deployment_steps=null"]
SPEC = config.read(LIGHT, sweep=False).cells[0].spec


def pretend(results: Path, *, code: str = "one", until: int = 5) -> RunFolder:
    """A cell of four steps, each a line, rollouts and a checkpoint: gone on with as `run_cell` does, `until` a step or to its end."""
    folder = RunFolder.of(results, SPEC)
    with folder.owned():
        if folder.state().name == "done":
            return folder
        saving = Checkpoints(folder.path, {"hash": folder.hash, "code": code}, 0.0)
        newest = saving.newest(folder.begins_with)
        folder.begin({"device": "none"}, newest and newest[1]["growing"])
        place, first, lines = torch.ones(64), 0, []
        if newest is not None:
            place, first, lines = newest[0].tensors["place"], newest[0].step, newest[1]["lines"]
        for step in range(first + 1, 5):
            if step == until:
                return folder
            place = place * 1.5 + step
            lines.append({"snapshot": step, "phi": float(place.sum())})
            folder.append({"step": step, "phi": float(place.sum()), "rollouts": {"texts": ["größer", f"than {step}"]}}, 0.25 * step)
            folder.check_owned()
            saving.save(step, {"place": place}, {"numbers": {}, "lines": lines, "growing": folder.growing()})
        write_atomically(folder.path / "deployment.jsonl", '{"prompt": "a", "text": "b"}\n')
        write_tensors(folder.path / "generator.safetensors", {"place": place})
        folder.finish({"snapshots": lines, "texts": ["a"], "seconds_total": 1.0}, b"a picture")
    return folder


def numbers(folder: RunFolder) -> dict:
    """All that must be the same in every run of `pretend`."""
    assert folder.state().name == "done", folder.state()
    names = ("metrics.jsonl", "rollouts.jsonl", "timings.jsonl", *CHECKED)
    assert not [path.name for path in folder.path.iterdir() if path.name.endswith(".partial")]
    return {name: (folder.path / name).read_bytes() for name in names} | {"result": folder.result()}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> dict:
    return numbers(pretend(tmp_path_factory.mktemp("quiet")))


# ---- every write fails once


class Disk:
    """Counts what is written under a folder; what happens at number `fails_at` is `fault`. A write fails when half of it is done."""

    def __init__(self, monkeypatch, folder: Path):
        self.folder, self.count, self.fails_at, self.fault = str(folder), 0, 0, lambda path: None
        for name in ("replace", "link", "rename", "mkdir", "truncate"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))
        inner_open, inner_save = io.open, safetensors.torch.save_file

        def opened(file, mode="r", *rest, **named):
            real = inner_open(file, mode, *rest, **named)
            ours = isinstance(file, (str, Path)) and str(file).startswith(self.folder) and set(mode) & set("wax")
            return _Half(real, self, file) if ours else real

        def save_file(tensors, path, metadata=None):
            Path(path).write_bytes(b"half")  # counts, and may fail
            inner_save(tensors, path, metadata)

        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr("builtins.open", opened)
        monkeypatch.setattr(safetensors.torch, "save_file", save_file)

    def _watched(self, inner):
        def call(path, *rest, **named):
            nothing_to_do = inner.__name__ == "mkdir" and os.path.isdir(
                path
            )  # the answer is no error to who asked for a folder to be there
            if str(path).startswith(self.folder) and not nothing_to_do:
                self.event(path)
            return inner(path, *rest, **named)

        return call

    def event(self, path) -> None:
        self.count += 1
        if self.count == self.fails_at:
            self.fault(path)

    def failing(self, at: int, fault) -> Disk:
        self.count, self.fails_at, self.fault = 0, at, fault
        return self


class _Half:
    def __init__(self, real, disk: Disk, path):
        self._real, self._disk, self._path = real, disk, path

    def write(self, content):
        half = content[: len(content) // 2]
        written = self._real.write(half)
        self._real.flush()
        self._disk.event(self._path)
        return written + self._real.write(content[len(half) :])

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __enter__(self):
        self._real.__enter__()
        return self

    def __exit__(self, *error):
        return self._real.__exit__(*error)


def system_error(number: int):
    def fault(path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    return fault


@pytest.fixture
def disk(monkeypatch, tmp_path) -> Disk:
    return Disk(monkeypatch, tmp_path)


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


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Words for a real cell whose method takes four steps that cost nothing; `trouble(at=...)` says what happens at each of them."""
    own = tmp_path / "own"
    (own / "methods").mkdir(parents=True)
    (own / "configs" / "method").mkdir(parents=True)
    (own / "methods" / "walk.py").write_text(WALK)
    (own / "configs" / "method" / "walk.yaml").write_text("name: walk\n")

    def trouble(at) -> list[str]:
        monkeypatch.setitem(sys.modules, "trouble_of_tests", SimpleNamespace(at=at))
        rest = ["deployment_texts=8", "deployment_steps=null", "launcher.checkpoint_seconds=0.0"]
        return ["sweep", "task=l2_norm", "method=walk", f"plugins={own}", *rest]

    return trouble


WALK = '''\
"""Takes steps and keeps its place."""
import sys

import torch

from dpgbench.api import Method, Snapshot


class Walk(Method):
    def run(self, bench):
        place, first = torch.ones(8), 0
        if bench.saved is not None:
            place, first = bench.saved.tensors["place"], bench.saved.step
        for step in range(first + 1, 5):
            place = place * 1.5 + step
            told = sys.modules["trouble_of_tests"].at(step, bench)
            bench.record(step=step, phi=float(place.sum()) if told is None else told)
            bench.checkpoint(step, lambda: {"place": place})
        yield Snapshot(4, lambda prompts: ["the cat sleeps."] * len(prompts))
'''


def nothing(step, bench) -> None:
    pass


def metrics(results: Path) -> dict[str, bytes]:
    assert len(list(results.glob("runs/*/result.json"))) == len(list(results.glob("runs/*/metrics.jsonl")))
    return {path.parent.name: path.read_bytes() for path in results.glob("runs/*/metrics.jsonl")}


def is_one_line(done, code: int, *says: str) -> None:
    assert done.code == code and done.err.count("\n") == 1 and "Traceback" not in done.out + done.err, done
    assert all(words in done.err for words in says), done.err


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


# ---- files that rot


def cut(content: bytes, at: float) -> bytes:
    return content[: int(at * len(content))]


def flipped(content: bytes, at: float) -> bytes:
    place = min(int(at * len(content)), len(content) - 1)
    return content[:place] + bytes([content[place] ^ 0x04]) + content[place + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut at the head": lambda content: cut(content, 0.1),
    "cut in the middle": lambda content: cut(content, 0.5),
    "cut at the tail": lambda content: content[:-1],
    "a bit at the head": lambda content: flipped(content, 0.02),
    "a bit in the middle": lambda content: flipped(content, 0.5),
    "a bit at the tail": lambda content: flipped(content, 0.97),
    "gone": None,
}


def damaged(path: Path, damage) -> None:
    if damage is None:
        path.unlink()
    else:
        changed = damage(path.read_bytes())
        assert path.read_bytes() != changed
        path.write_bytes(changed)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
def test_a_damaged_result_is_none(tmp_path, quiet, name, damage):
    """Nor is it run again unasked: only a result that is gone altogether is as good as none."""
    folder = pretend(tmp_path)
    damaged(folder.path / name, damage)
    state = folder.state()
    if (name, damage) == ("result.json", None):
        assert numbers(pretend(tmp_path)) == quiet
        return
    assert state.name == "damaged" and name in state.detail
    with pytest.raises(UserError, match="delete the folder and run the cell again"):
        folder.result()
    assert numbers(pretend(tmp_path)) == quiet


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", CHECKED)
def test_a_damaged_file_of_a_finished_cell_is_named(tmp_path, name, damage):
    folder = pretend(tmp_path)
    assert folder.whole(name).read_bytes()
    damaged(folder.path / name, damage)
    with pytest.raises(UserError, match=f"{name} is (gone|not what the finished run wrote).*; delete the folder and run the cell again"):
        folder.text(name)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", [*GROWING, "the newest checkpoint", "both checkpoints", "spec.yaml", "env.json"])
def test_a_damaged_file_of_an_interrupted_cell_changes_no_number(tmp_path, quiet, name, damage):
    folder = pretend(tmp_path, until=4)
    steps = checkpoints.steps_in(folder.path)
    assert steps == [3, 2]
    counts = {"the newest checkpoint": 1, "both checkpoints": 2}
    paths = [checkpoints.path_of(folder.path, step) for step in steps[: counts.get(name, 0)]] or [folder.path / name]
    for path in paths:
        damaged(path, damage)
    assert folder.state().name in ("interrupted", "missing")
    assert numbers(pretend(tmp_path)) == quiet


def test_no_bit_of_a_checkpoint_can_flip_unseen(tmp_path):
    """Some hundred of them, over the header, the numbers in it, and the tensors."""
    saving = Checkpoints(tmp_path, {"hash": "a", "code": "b"})
    saving.save(1, {"place": torch.arange(40.0)}, {"numbers": {"spent": 123456}, "growing": {}})
    path = checkpoints.path_of(tmp_path, 1)
    whole = path.read_bytes()
    assert saving.newest(lambda growing: True) is not None
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place // 2 % 8)]) + whole[place + 1 :])
        found = saving.newest(lambda growing: True)
        if found is not None:  # a bit of safetensors' own, say a name of a type in another case, that changes nothing
            assert found[1]["numbers"] == {"spent": 123456} and torch.equal(found[0].tensors["place"], torch.arange(40.0)), place


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES.values() if damage], ids=[name for name in DAMAGES if DAMAGES[name]])
@pytest.mark.parametrize("columns", [3, 30])
def test_a_damaged_parquet_is_refused(tmp_path, request, damage, columns):
    """Or read as it was: a footer has counts and bounds of the columns that nothing here uses."""
    import pandas

    path = tmp_path / "a.parquet"
    frame = pandas.concat([small_frame()] * 10, ignore_index=True)
    frame = frame.assign(**{f"metric:{number}": [1 / (row + 3) for row in range(len(frame))] for number in range(columns)})
    parquet.write_parquet(frame, path, suite="a", title="b", command="c")
    whole = parquet.read_parquet(path)[0]
    assert whole["metric:0"].equals(frame["metric:0"])
    damaged(path, damage)
    try:
        pandas.testing.assert_frame_equal(parquet.read_parquet(path)[0], whole)
        assert "bit" in request.node.callspec.id
    except UserError as refused:
        assert "cannot be read as parquet" in str(refused) and "; restore it or run the suite again" in str(refused)


def test_no_bit_of_a_parquets_footer_can_flip_unseen(tmp_path):
    """It holds the names of the columns and what the file says of itself, and has no checksum of parquet's."""
    import pandas

    path = tmp_path / "a.parquet"
    parquet.write_parquet(small_frame(), path, suite="a", title="b", command="c")
    (frame, about), whole = parquet.read_parquet(path), path.read_bytes()
    for place in range(0, len(whole), 101):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place // 101 % 8)]) + whole[place + 1 :])
        try:
            found, said = parquet.read_parquet(path)
        except UserError:
            continue
        pandas.testing.assert_frame_equal(found, frame)
        assert said == about


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_memory_of_a_sweep_is_one_line(dpgbench, tmp_path, damage):
    """What `status name=...` reads; a word that lost a bit is refused as any other word that was typed wrong."""
    saved = tmp_path / "runs" / "mine.sweep.json"
    write_atomically(saved, json.dumps([*LIGHT[:2], "name=mine"]))
    assert dpgbench("status", "name=mine", f"results={tmp_path}").code == 0
    damaged(saved, damage)
    done = dpgbench("status", "name=mine", f"results={tmp_path}")
    if damage is not None:
        is_one_line(done, 2)


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
