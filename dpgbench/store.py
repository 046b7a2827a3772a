"""Run folders: what a cell leaves behind, and in which state it is. Everything is read from files; nothing is remembered elsewhere.

results/runs/<task>.<method>.s<seed>.<hash>/
    spec.yaml       the resolved configuration; `run spec=...` replays it
    env.json        versions, git commit, device
    metrics.jsonl   one line per step and per snapshot, append-only, the same in every run of the cell (no clock in it)
    timings.jsonl   wall-clock seconds of the same lines
    rollouts.jsonl  every step's texts, raw rewards and advantages, for methods that train a policy
    result.json     the outcome; written last, by rename: it marks the cell done
    picture.png     what the task drew, if it draws
    error.txt       why the cell failed, if it did
    lock            held while a process works on the cell
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dpgbench.api import RunSpec
from dpgbench.errors import Busy, UserError

SCHEMA = 1


@dataclass(frozen=True)
class State:
    """Where a cell stands: "done", "failed", "running", "interrupted", "missing" or "damaged", and one line of why or how far."""

    name: str
    detail: str = ""


class RunFolder:
    """One cell's folder."""

    def __init__(self, path: Path, spec: RunSpec | None = None):
        """`spec` is needed for running the cell, not for reading what it left."""
        self.path, self.spec = path, spec
        self.hash = path.name.rpartition(".")[2]

    @classmethod
    def of(cls, results: Path, spec: RunSpec) -> RunFolder:
        """The folder of a cell under a results folder."""
        return cls(results / "runs" / spec.folder, spec)

    def state(self) -> State:
        """Read from the files alone; costs a few file system calls."""
        result, error, lock = self.path / "result.json", self.path / "error.txt", self.path / "lock"
        if result.exists():
            problem = self._problem_with(result)
            return State("damaged", problem) if problem else State("done")
        if lock.exists() and _is_locked(lock):
            return State("running", self.progress())
        if error.exists():
            return State("failed", last_line(error))
        if (self.path / "metrics.jsonl").exists():
            return State("interrupted", self.progress())
        return State("missing")

    def progress(self) -> str:
        """How far a cell got, from the last line of its metrics."""
        steps = [line["step"] for line in read_lines(self.path / "metrics.jsonl", last_bytes=16384) if "step" in line]
        return f"step {steps[-1]}" if steps else "starting"

    def result(self) -> dict[str, Any]:
        """The outcome of a finished cell. Raises UserError if the file is damaged."""
        path = self.path / "result.json"
        problem = self._problem_with(path)
        if problem:
            raise UserError(f"{self.path}: {problem}; delete the folder and run the cell again")
        return json.loads(path.read_text())

    def _problem_with(self, result: Path) -> str:
        try:
            content = json.loads(result.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError):
            return "result.json is not valid JSON (a damaged file)"
        except OSError as error:
            return f"result.json cannot be read ({error.strerror})"
        if not isinstance(content, dict) or content.get("schema") != SCHEMA or "snapshots" not in content:
            return "result.json was written by another version of dpgbench"
        if content.get("hash") != self.hash:
            return f"result.json belongs to another cell (hash {content.get('hash')}, not {self.hash})"
        lines = count_lines(self.path / "metrics.jsonl")
        return "" if lines == content["lines"] else f"metrics.jsonl has {lines} whole lines where the finished run wrote {content['lines']}"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the cell for this process. Raises Busy if another process works on it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"{self.path.name}: another process works on this cell; wait for it, or stop it first") from None
            yield

    def begin(self, env: dict[str, Any]) -> None:
        """Start the cell afresh: what an interrupted run left is removed."""
        for name in ("metrics.jsonl", "timings.jsonl", "rollouts.jsonl", "result.json", "error.txt", "picture.png"):
            (self.path / name).unlink(missing_ok=True)
        write_atomically(self.path / "spec.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(self.spec.config))))
        write_atomically(self.path / "env.json", json.dumps(env, indent=1))

    def append(self, line: dict[str, Any], seconds: float) -> None:
        """One line of progress; what it has under "rollouts" goes to a file of its own."""
        rollouts = line.get("rollouts")
        line = {key: value for key, value in line.items() if key != "rollouts"}
        if rollouts is not None:
            _append(self.path / "rollouts.jsonl", {"step": line["step"], **rollouts})
        _append(self.path / "metrics.jsonl", line)
        _append(
            self.path / "timings.jsonl", {**{key: line[key] for key in ("step", "snapshot") if key in line}, "seconds": round(seconds, 3)}
        )

    def finish(self, result: dict[str, Any], picture: bytes | None) -> None:
        """Mark the cell done."""
        if picture is not None:
            write_atomically(self.path / "picture.png", picture)
        lines = count_lines(self.path / "metrics.jsonl")
        write_atomically(self.path / "result.json", json.dumps({"schema": SCHEMA, "hash": self.hash, "lines": lines, **result}))

    def fail(self, reason: str) -> None:
        """Mark the cell failed; the last line of `reason` is what lists show."""
        write_atomically(self.path / "error.txt", reason.rstrip() + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary name, flush to disk, rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(results: Path) -> None:
    """Raises UserError if the results folder cannot take files, before any computing is done."""
    runs = results / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        write_atomically(runs / "probe", b"0" * 65536)
        (runs / "probe").unlink()
    except OSError as error:
        fix = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a folder you may write to"
        raise UserError(f"results={results}: cannot write there ({error.strerror}); {fix}, or give another with results=DIR") from None


def read_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file, or those in its last bytes; lines cut short (by a kill, by the window) are left out."""
    try:
        with open(path, "rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            content = file.read()
    except FileNotFoundError:
        return []
    lines = []
    for line in content.split(b"\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def count_lines(path: Path) -> int:
    """The number of whole lines; 0 if there is no file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def last_line(path: Path) -> str:
    """The last line of a text file that is not empty."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _is_locked(path: Path) -> bool:
    """Whether some process holds the lock. The kernel lets go of it when that process ends, however it ends."""
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
