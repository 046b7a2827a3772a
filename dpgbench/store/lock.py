"""One owner per cell, across processes, hosts and network file systems.

Ownership is a file `lock.<n>` in the cell's folder; the highest n counts. It names its owner (host, pid, boot, SLURM job) and is
touched every few seconds, its heartbeat. Taking a cell is creating `lock.<n+1>` by a hard link, which one process alone can do, on NFS
too (`flock` holds between hosts only on some file systems). Numbers are never used twice, so a slow process that read an old state
creates nothing that counts. Letting go is renaming to `lock.<n>.free`, which needs no disk space.

An owner counts as dead in three cases: its process no longer exists (tested by pid and start time, if the reader is on the same machine,
boot and pid namespace); the reader is a later start of the owner's own SLURM job; or, where the process cannot be tested, its last
heartbeat is more than STALE_SECONDS old. An owner that was wrongly counted as dead and continues finds a lock number higher than its own
before it writes the next line, and stops (`Lock.check`).
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from dpgbench.core.errors import Busy, Gone, Lost

BEAT_SECONDS = 5.0
STALE_SECONDS = 120.0
FILE = re.compile(r"lock\.(\d+)(\.free)?")
_let_go: set[str] = set()  # this process's own, also where the file system took no notice


@dataclass(frozen=True)
class Owner:
    """A process, so described that another one can tell whether it still lives."""

    host: str
    machine: str  # boot id and pid namespace: pids mean the same where these are equal; "" where the system does not tell
    pid: int
    started: str  # the process's start time, in clock ticks since boot: a pid used again has another
    job: str = ""  # SLURM's job id, with the array index
    token: str = ""

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        job, array, index = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
        return cls(socket.gethostname(), _machine(), pid, _start_time(pid) or "", f"{array}_{index}" if array else job, uuid.uuid4().hex)

    @classmethod
    def read(cls, path: Path) -> Owner:
        """The owner that a file names. Raises ValueError for anything else: a pid is a number that a signal may be sent to."""
        try:
            owner = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        words = (owner.host, owner.machine, owner.started, owner.job, owner.token)
        untold = owner.machine and not owner.started  # where processes can be tested, each has a start time
        if type(owner.pid) is not int or owner.pid < 1 or not all(isinstance(word, str) for word in words) or untold:
            raise ValueError(f"{path.name} names no process")
        return owner

    def lives(self, age: float) -> bool:
        """Whether its process runs; `age` is the seconds since its heart beat, and decides where pids say nothing."""
        if self.machine and self.machine == _machine() and self.host == socket.gethostname():
            return _start_time(self.pid) == self.started and self.token not in _let_go
        return age < STALE_SECONDS

    def __str__(self) -> str:
        return f"{f'job {self.job}, ' if self.job else ''}pid {self.pid} on {self.host}"


@dataclass(frozen=True)
class Held:
    """What the lock files of a folder say: number `n`, who holds it, the heartbeat's age, and whether that owner is alive."""

    n: int
    owner: Owner | None = None
    age: float = 0.0
    alive: bool = False


def look(folder: Path) -> Held:
    """Read a folder's lock, changing nothing. Costs a directory listing and a small file; no owner: nobody holds it."""
    return _look(folder, time.time())


def _look(folder: Path, now: float) -> Held:
    for _ in range(100):
        n, free = _highest(folder)
        if n == 0 or free:
            return Held(n)
        path = folder / f"lock.{n}"
        try:
            age = abs(now - path.stat().st_mtime)  # a beat in the future is of a clock that was set back since, and none of now
            owner = Owner.read(path)
        except FileNotFoundError:  # let go of, or overtaken, between the two looks
            continue
        except (ValueError, IsADirectoryError):  # damaged, or of another version: its heartbeat alone decides
            return Held(n, Owner("unknown host", "", 0, ""), age, age < STALE_SECONDS)
        return Held(n, owner, age, owner.lives(age))
    raise Busy(f"{folder.name}: its lock changes hands faster than it can be read; try again")


def _highest(folder: Path) -> tuple[int, bool]:
    """The highest number among the lock files, and whether it has been let go of; (0, False) if there is none."""
    try:
        found = [match for name in os.listdir(folder) if (match := FILE.fullmatch(name))]
    except (FileNotFoundError, NotADirectoryError):
        return 0, False
    return max(((int(match[1]), bool(match[2])) for match in found), default=(0, False))


class Lock:
    """The lock of one folder, held by this process between `take` and `release`."""

    def __init__(self, folder: Path):
        self.folder, self.owner, self.n = folder, Owner.me(), 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        return self.folder / f"lock.{self.n}"

    def take(self) -> Held:
        """Own the folder, or raise Busy naming who does. Returns what was found: an owner in it is a dead one, now taken over."""
        mine = self.folder / f".lock.{self.owner.token}"
        try:
            mine.write_text(json.dumps(asdict(self.owner)), encoding="utf-8")
            now = mine.stat().st_mtime  # heartbeats are judged by the file system's clock, not by each host's own
            found = _look(self.folder, now)
            if found.alive and not self._is_an_earlier_start_of_my_job(found.owner):
                raise Busy(f"{self.folder.name}: another process works on this cell ({found.owner}); wait for it, or stop it first")
            self.n = found.n + 1
            try:
                os.link(mine, self.path)
            except FileExistsError:
                raise Busy(f"{self.folder.name}: another process was first; wait for it, or stop it first") from None
            if _highest(self.folder) != (self.n, False):  # `found` was old: others have had this number or a higher one, and let go of it
                self.path.unlink(missing_ok=True)
                raise Busy(f"{self.folder.name}: another process was first; wait for it, or stop it first")
        finally:
            mine.unlink(missing_ok=True)
        for name in os.listdir(self.folder):
            if (match := FILE.fullmatch(name)) and int(match[1]) < self.n:
                (self.folder / name).unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return found

    def release(self) -> None:
        """Let go, if it is still this process's."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        _let_go.add(self.owner.token)
        try:
            os.rename(self.path, self.folder / f"lock.{self.n}.free")
        except OSError:  # taken over, the folder is gone, or the file system is: a lock whose process ends is not in the way
            return

    def check(self) -> None:
        """Raises Lost if another process has taken over, Gone if the folder is not there any more. Costs one directory listing."""
        there = _highest(self.folder)
        if there[0] == 0:
            raise Gone(f"{self.folder.name}: its folder was deleted or replaced")
        if there != (self.n, False):
            raise Lost(f"{self.folder.name}: taken over by another process while this one did not answer; stopping without a trace")

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:  # taken over, or the file system is away: `check` tells before the next write
                continue

    def _is_an_earlier_start_of_my_job(self, other: Owner) -> bool:
        """SLURM starts a job again only when its last start is over, on whatever node that was."""
        return bool(self.owner.job) and other.job == self.owner.job and other.host != self.owner.host


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When a process started, None if it is gone or only waits to be reaped."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
