"""What the tests of faults share: a cell to break, a disk that breaks it, and what must hold afterwards. `pretend` writes whatever a cell
writes and computes nothing, so that each of its writes can fail in turn. `WALK` is the method of a real cell, for faults that show only in
the whole program. The fixtures made of them, `quiet` and `walk`, are in conftest.py.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import safetensors.torch
import torch

from dpgbench import config
from dpgbench.core.files import write_atomically
from dpgbench.store.checkpoints import Checkpoints, write_tensors
from dpgbench.store.run_folder import CHECKED, RunFolder

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


# ---- a disk that fails


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
            # A folder that is there already is no write, and no error to who asked for it.
            there = inner.__name__ == "mkdir" and os.path.isdir(path)
            if str(path).startswith(self.folder) and not there:
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


# ---- a real cell

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
