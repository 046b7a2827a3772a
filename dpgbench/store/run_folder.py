"""Run folders: what a cell leaves behind, and in which state it is. Everything is read from files; nothing is remembered elsewhere.

results/runs/<task>.<method>.s<seed>.<hash>/
    spec.yaml       the resolved configuration; `run spec=...` replays it
    env.json        versions, git commit, device, processor
    metrics.jsonl   one line per step and per snapshot, append-only, the same in every run of the cell (no clock in it)
    timings.jsonl   wall-clock seconds of the same lines
    rollouts.jsonl  every step's texts, raw rewards and advantages, for methods that train a policy
    deployment.jsonl        the texts of the last scored snapshot, with their prompts
    generator.safetensors   the weights that wrote them, where the method trained its generator and scale.keep_generator is true
    tracking/       files of TensorBoard and the like, where policy.report_to names one
    result.json     the outcome, with checksums of itself and of the other files; written last, by rename: it marks the cell done
    picture.png     what the task drew, if it draws
    error.txt       why the cell failed, if it did
    job.json        the SLURM job that was given the cell
    log.txt         what a worker process wrote to its standard output and error
    lock.<n>        who works on the cell (lock.py); lock.<n>.free: who did
    checkpoint.<step>.safetensors   where an interrupted cell goes on from (checkpoints.py)
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpgbench.core.cell import RunSpec
from dpgbench.core.documents import Unreadable, json_of, settings_of, text_of
from dpgbench.core.errors import Busy, UserError
from dpgbench.core.files import write_atomically
from dpgbench.store import checkpoints, lock

SCHEMA = 1
TRACKERS = "tracking"  # the folder of trackers' files, where a policy reports to some
SECTIONS = ("task", "method", "training", "scale")
GROWING = ("metrics.jsonl", "timings.jsonl", "rollouts.jsonl")  # appended to, line by line
CHECKED = ("spec.yaml", "env.json", "deployment.jsonl", "generator.safetensors", "picture.png")  # whose checksums a result has besides


@dataclass(frozen=True)
class State:
    """Where a cell stands, and one line of why or how far.

    done, failed (and stays so until it is asked for again), running, stale (its owner died), interrupted (stopped on request or by
    a kill that nobody was there to see), missing (never started), damaged (its files contradict each other). Stale, interrupted and
    missing cells are what a sweep runs.
    """

    name: str
    detail: str = ""


class RunFolder:
    """One cell's folder."""

    def __init__(self, path: Path, spec: RunSpec | None = None):
        """`spec` is needed for running the cell, not for reading what it left."""
        self.path, self.spec = path, spec
        self.hash = path.name.rpartition(".")[2]
        self._lock: lock.Lock | None = None
        self._files: dict[str, int] | None = None  # checksums of a finished cell's files, once its result was read
        self._sums: dict[str, int] = {}  # of the growing files, of what was written: a disk may return something else

    @classmethod
    def of(cls, results: Path, spec: RunSpec) -> RunFolder:
        """The folder of a cell under a results folder."""
        return cls(results / "runs" / spec.folder, spec)

    def state(self) -> State:
        """Read from the files alone; costs a few file system calls."""
        result, error = self.path / "result.json", self.path / "error.txt"
        if result.exists():
            _, problem = self._read_result()
            return State("damaged", problem) if problem else State("done")
        held = lock.look(self.path)
        if held.alive:
            return State("running", self.progress())
        if error.exists():
            return State("failed", last_line(error))
        if held.owner is not None:
            return State("stale", f"{self.progress()}; its owner ({held.owner}) died, heartbeat {held.age:.0f} s ago")
        if (self.path / "metrics.jsonl").exists():
            return State("interrupted", f"{self.progress()}, {checkpoints.where_to_go_on(self.path)}")
        return State("missing")

    def occupied(self) -> str:
        """In words, why a cell that another process has was not run."""
        held = lock.look(self.path)
        who = f" ({held.owner})" if held.owner is not None else ""
        return f"another process works on this cell{who}; wait for it, or stop it first; the same command then goes on"

    def progress(self) -> str:
        """How far a cell got, from the last line of its metrics."""
        steps = [line["step"] for line in read_lines(self.path / "metrics.jsonl", last_bytes=16384) if type(line.get("step")) is int]
        return f"step {steps[-1]}" if steps else "starting"

    def result(self) -> dict[str, Any]:
        """The outcome of a finished cell. Raises UserError if the file is damaged."""
        content, problem = self._read_result()
        if problem:
            raise self._damaged(problem)
        self._files = content.pop("files", {})  # kept, for a report asks for a cell's files one by one
        return content

    def scored(self) -> dict[str, Any]:
        """`result`, with all that a report or an export looks for in it. Raises UserError where that is not so."""
        content = self.result()
        flaw = _flaw_of(content)
        if flaw:
            raise self._damaged(f"result.json {flaw}")
        return content

    def config(self) -> dict[str, Any]:
        """The cell's settings as `spec.yaml` has them. Raises UserError where it has none."""
        try:
            content = settings_of(self.text("spec.yaml"))
        except Unreadable as reason:
            raise self._damaged(f"spec.yaml cannot be read ({reason})") from None
        if not isinstance(content, dict) or not all(isinstance(content.get(section), dict) for section in SECTIONS):
            raise self._damaged("spec.yaml has not the settings of a cell")
        return content

    def _damaged(self, problem: str) -> UserError:
        return UserError(f"{self.path}: {problem}; delete the folder and run the cell again")

    def whole(self, name: str) -> Path:
        """The path of a finished cell's file that is as it was when the cell ended. Raises UserError if it is damaged or gone."""
        if self._files is None:
            self.result()
        known, found = self._files.get(name), _checksum(self.path / name)
        if found is None or known not in (None, found):  # none is known where the cell finished before sums were kept
            raise self._damaged(f"{name} {'is gone' if found is None else 'is not what the finished run wrote (a damaged file)'}")
        return self.path / name

    def text(self, name: str) -> str:
        """What such a file says. Errors as in `whole`."""
        try:
            return text_of(self.whole(name))
        except Unreadable as reason:
            raise self._damaged(f"{name} cannot be read ({reason})") from None

    def _read_result(self) -> tuple[dict[str, Any], str]:
        """What `result.json` says, without its own checksum, and what is wrong with it or with the metrics beside it; "" if nothing."""
        try:
            content = json_of(text_of(self.path / "result.json"))
        except Unreadable as reason:
            return {}, f"result.json is {reason} (a damaged file)"
        ours = isinstance(content, dict) and content.get("schema") == SCHEMA and {"snapshots", "lines"} <= set(content)
        if not ours or not isinstance(content.get("files", {}), dict):
            return {}, "result.json was written by another version of dpgbench"
        if content.get("hash") != self.hash:
            return {}, f"result.json belongs to another cell (hash {content.get('hash')}, not {self.hash})"
        checksum = content.pop("checksum", None)  # older results have neither this nor "files"
        if (checksum is not None or "files" in content) and checksum != zlib.crc32(json.dumps(content).encode()):
            return {}, "result.json is not what the finished run wrote (a damaged file)"
        try:
            metrics = (self.path / "metrics.jsonl").read_bytes()
        except OSError as error:
            return {}, f"metrics.jsonl cannot be read ({error.strerror})"
        lines = metrics.count(b"\n")
        if lines != content["lines"]:
            return {}, f"metrics.jsonl has {lines} whole lines where the finished run wrote {content['lines']}"
        known = content.get("files", {}).get("metrics.jsonl")
        if known not in (None, zlib.crc32(metrics)):
            return {}, "metrics.jsonl is not what the finished run wrote (a damaged file)"
        return content, ""

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the cell for this process. Raises Busy if another process works on it."""
        self.path.mkdir(parents=True, exist_ok=True)
        taken = lock.Lock(self.path)
        taken.take()
        self._lock = taken
        try:
            yield
        finally:
            self._let_go()

    def _let_go(self) -> None:
        held, self._lock = self._lock, None
        if held is not None:
            held.release()

    def begin(self, env: dict[str, Any], growing: Mapping[str, Sequence[int]] | None = None) -> None:
        """Start the cell afresh, removing what an interrupted run left; or go on where its growing files were as `growing` said."""
        from omegaconf import OmegaConf

        self.check_owned()
        self._files = None
        kept = growing or {}
        for name in ("result.json", "error.txt", "picture.png", *(name for name in GROWING if name not in kept)):
            (self.path / name).unlink(missing_ok=True)
        for partial in self.path.glob(".*.partial"):  # what a killed owner was writing
            if not partial.name.startswith(".job.json."):  # which is a sweep's
                partial.unlink(missing_ok=True)
        if growing is None:
            checkpoints.remove(self.path)
            shutil.rmtree(self.path / TRACKERS, ignore_errors=True)
        for name, (size, _) in kept.items():
            os.truncate(self.path / name, size)
        self._sums = {name: checksum for name, (_, checksum) in kept.items()}
        write_atomically(self.path / "spec.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(self.spec.config))))
        write_atomically(self.path / "env.json", json.dumps(env, indent=1))

    def growing(self) -> dict[str, tuple[int, int]]:
        """Size and checksum of the growing files, for a checkpoint to go back to."""
        return {name: ((self.path / name).stat().st_size, self._sums[name]) for name in GROWING if name in self._sums}

    def begins_with(self, growing: Mapping[str, Sequence[int]]) -> bool:
        """Whether the growing files, which may be longer by now, have those bytes at their beginning. Reads them whole."""
        return all(_checksum(self.path / name, size) == checksum for name, (size, checksum) in growing.items())

    def check_owned(self) -> None:
        """Raises Lost if the cell was taken over; every write asks first."""
        if self._lock is not None:
            self._lock.check()

    def append(self, line: dict[str, Any], seconds: float) -> None:
        """One line of progress; what it has under "rollouts" goes to a file of its own."""
        self.check_owned()
        rollouts = line.get("rollouts")
        line = {key: value for key, value in line.items() if key != "rollouts"}
        if rollouts is not None:
            self._append("rollouts.jsonl", {"step": line["step"], **rollouts})
        self._append("metrics.jsonl", line)
        self._append("timings.jsonl", {**{key: line[key] for key in ("step", "snapshot") if key in line}, "seconds": round(seconds, 3)})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        content = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        with open(self.path / name, "ab") as file:
            file.write(content)
        self._sums[name] = zlib.crc32(content, self._sums.get(name, 0))

    def finish(self, result: dict[str, Any], picture: bytes | None) -> None:
        """Mark the cell done."""
        self.check_owned()
        if picture is not None:
            write_atomically(self.path / "picture.png", picture)
        lines = count_lines(self.path / "metrics.jsonl")
        sums = {name: checksum for name in CHECKED if (checksum := _checksum(self.path / name)) is not None} | self._sums
        content = json.loads(json.dumps({"schema": SCHEMA, "hash": self.hash, "lines": lines, **result, "files": sums}))
        write_atomically(self.path / "result.json", json.dumps({**content, "checksum": zlib.crc32(json.dumps(content).encode())}))
        checkpoints.remove(self.path)

    def out_of_time(self, seconds: float) -> str:
        """Why a cell that took longer than `launcher.cell_seconds` has failed."""
        return (
            f"launcher.cell_seconds={seconds:g}: the cell took longer and was stopped ({self.progress()}); give more time, as in "
            f"launcher.cell_seconds={10 * seconds:g} retry=failed"
        )

    def fail(self, reason: str) -> None:
        """Mark the cell failed; the last line of `reason` is what lists show."""
        self.check_owned()
        write_atomically(self.path / "error.txt", reason.rstrip() + "\n")

    def fail_and_let_go(self, reason: str) -> None:
        """`fail` for an owner whose process ends right after, from another thread than the one that waits; nothing unless it is owned."""
        if self._lock is not None:
            self.fail(reason)
            self._let_go()

    def fail_unless_owned(self, reason: str) -> str:
        """For a process that saw the owner die: "failed", or how the cell stands by now ("done", "busy")."""
        try:
            with self.owned():
                if self.state().name in ("done", "damaged"):
                    return "done"
                self.fail(reason)
                return "failed"
        except Busy:
            return "busy"


def check_writable(results: Path) -> None:
    """Raises UserError if the results folder cannot take files, before any computing is done."""
    runs = results / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        probe = runs / f".probe.{uuid.uuid4().hex}"  # another process may ask at the same time
        write_atomically(probe, b"0" * 65536)
        probe.unlink()
    except OSError as error:
        fix = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a folder you may write to"
        raise UserError(f"results={results}: cannot write there ({error.strerror}); {fix}, or give another with results=DIR") from None


def read_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file, objects all, or those in its last bytes; lines cut short (by a kill, by the window) are left out."""
    try:
        with open(path, "rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            content = file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return []
    lines = []
    for line in content.split(b"\n"):
        try:
            lines.append(json_of(line))
        except Unreadable:
            continue
    return [line for line in lines if isinstance(line, dict)]


def _is_number(value: Any) -> bool:
    """One that a table can hold; JSON's have any length."""
    return type(value) is float or (type(value) is int and -(2**63) <= value < 2**63)


def _flaw_of(result: dict[str, Any]) -> str:
    """What a finished cell's result lacks for those who read it; "" if nothing."""
    kinds = {"headline": str, "higher_is_better": bool, "snapshots": list, "texts": list}
    wrong = [name for name, kind in kinds.items() if type(result.get(name)) is not kind]
    if wrong:
        return f"has no {wrong[0]}"
    lines = [*result["snapshots"], *(result.get("deployments") or [])]
    if not result["snapshots"] or not all(isinstance(line, dict) for line in lines):
        return "has no snapshots"
    if not all(isinstance(text, str) for text in result["texts"]):
        return "has texts that are none"
    for line in lines:
        numbers = {name: line.get(name) for name in ("snapshot", "flops", "tokens_generated", "tokens_trained", "seconds", "phi")}
        measures = line.get("measures")
        if not isinstance(measures, dict) or not isinstance(line.get("flops_by_phase"), dict):
            return "has a snapshot without measures"
        unlike = [name for name, value in {**numbers, **measures}.items() if not _is_number(value) and value is not None]
        if unlike or None in (numbers["snapshot"], numbers["flops"]):
            return f"has a snapshot whose {unlike[0] if unlike else 'place'} is no number"
    return ""


def count_lines(path: Path) -> int:
    """The number of whole lines; 0 if there is no file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def last_line(path: Path) -> str:
    """The last line of a text file that is not empty; "" if there is none, or no file, which another process may just have removed."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""
    lines = [line for line in content.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _checksum(path: Path, size: int | None = None) -> int | None:
    """CRC-32 of a file, or of its first bytes; None where it is not there or shorter than they are."""
    if not path.is_file():
        return None
    total, left = 0, path.stat().st_size if size is None else size
    try:
        with open(path, "rb") as file:
            while left and (block := file.read(min(left, 1 << 20))):
                total, left = zlib.crc32(block, total), left - len(block)
    except FileNotFoundError:
        return None
    return None if left else total
