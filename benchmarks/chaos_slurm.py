"""Disturb a SLURM sweep at random until it is through, then compare every number with a local sweep that was left in peace.

    python benchmarks/chaos_slurm.py --cells 200

One array task for each cell, on the one-node cluster of tests/slurm/start.sh, which is started for it and stopped at the end (root, Debian
or Ubuntu). Every few seconds, once a cell has written something new, one of these happens: scancel of a running or of a waiting task; a job
of higher priority takes the whole node; slurmd gets SIGKILL and is started again, alone or with everything that ran on the node; slurmctld
gets SIGKILL and is started again; the waiting sweep gets SIGKILL. Whenever the sweep ends with cells left, it is started again with
retry=failed. Passes if every cell is done, each row is in the collected parquet once, results, metrics.jsonl and rollouts.jsonl equal the
quiet run's, no two processes were seen at one cell, no result was written twice, and no job stays in the queue. Prints its counts as one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import chaos

METHODS = ("dpg", "active_inheritance", "base", "prompt_only")  # the first makes checkpoints; all of them are short beside their imports
JOB = ["launcher=slurm", "launcher.mem_gb=1.5", "launcher.time_min=10", "launcher.warning_seconds=60", "launcher.wait=true"]
SCRIPTS = chaos.ROOT / "tests" / "slurm"
DAEMONS = Path(os.environ.get("SLURM_TEST_DIR", "/tmp/dpgbench-test-slurm"))
AT_ONE_CELL = 3  # looks, a second apart: a process that finds a cell taken goes away sooner
DRAIN_SECONDS = 300


def start_cluster() -> None:
    """Start what of the cluster does not run, and let SLURM's commands find it."""
    done = subprocess.run(["bash", SCRIPTS / "start.sh"], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"SLURM does not start: {done.stderr.strip() or done.stdout.strip()}")
    os.environ["SLURM_CONF"] = done.stdout.strip().rpartition("=")[2]


def slurm(*command: str) -> list[str]:
    """The lines that one of SLURM's commands prints."""
    return subprocess.run(command, capture_output=True, encoding="utf-8").stdout.splitlines()


def jobs(state: str, form: str = "%i") -> list[str]:
    return slurm("squeue", "--me", "--noheader", "--array", "--partition=main", f"--states={state}", f"--format={form}")


class Watch(threading.Thread):
    """Looks once a second which processes work at which cell, and which results are there.

    A worker's standard output is its cell's log.txt for as long as it works on that cell.
    """

    def __init__(self, results: Path, known: dict[str, list[int]]):
        super().__init__(daemon=True)
        self.runs, self.over = results / "runs", threading.Event()
        self.problems: list[str] = []
        self.looks = 0
        self._together: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.results = known  # inode and time of each result.json

    def run(self) -> None:
        while not self.over.wait(1.0):
            self.look()

    def look(self) -> None:
        self.looks += 1
        for cell, pids in self._workers().items():
            if len(pids) > 1:
                self._together[cell, pids] += 1
                if self._together[cell, pids] == AT_ONE_CELL:
                    self.problems.append(f"{cell}: processes {pids} were at it at the same time")
        for path in self.runs.glob("*/result.json"):
            status = path.stat()
            identity = [status.st_ino, status.st_mtime_ns]
            if self.results.setdefault(path.parent.name, identity) != identity:
                self.problems.append(f"{path.parent.name}: finished twice")
                self.results[path.parent.name] = identity

    def _workers(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, list[int]] = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                output = Path(os.readlink(process / "fd" / "1"))
            except OSError:
                continue
            if output.name == "log.txt" and output.parent.parent == self.runs:
                found.setdefault(output.parent.name, []).append(int(process.name))
        helpers = {child for pids in found.values() for pid in pids for child in chaos.children(pid)}  # what a worker itself started
        return {cell: tuple(sorted(set(pids) - helpers)) for cell, pids in found.items()}


class Disturbances:
    """What can happen to a cluster. Each takes place and is counted, or returns False because there is nothing that it could hit."""

    def __init__(self, rng: random.Random, counts: dict[str, int]):
        self.rng, self.counts = rng, counts
        self.sweep: subprocess.Popen | None = None
        self.kinds: dict[str, tuple[int, Callable[[], bool]]] = {
            "running tasks cancelled": (4, lambda: self._cancel("RUNNING")),
            "waiting tasks cancelled": (2, lambda: self._cancel("PENDING")),
            "preemptions": (1, self._preempt),  # this and the next cost every running task what it has not written down
            "node crashes": (1, self._crash_node),
            "slurmd restarts": (2, lambda: self._restart("slurmd")),
            "slurmctld restarts": (1, lambda: self._restart("slurmctld")),
            "sweeps killed": (1, self._kill_sweep),
        }

    def one(self) -> None:
        names = list(self.kinds)
        while names:
            name = self.rng.choices(names, [self.kinds[name][0] for name in names])[0]
            if self.kinds[name][1]():
                self.counts[name] = self.counts.get(name, 0) + 1
                print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
                return
            names.remove(name)

    def total(self) -> int:
        return sum(self.counts.get(name, 0) for name in self.kinds)

    def _cancel(self, state: str) -> bool:
        found = jobs(state)
        if not found:
            return False
        return subprocess.run(["scancel", self.rng.choice(found)], capture_output=True).returncode == 0

    def _preempt(self) -> bool:
        if not jobs("RUNNING"):
            return False
        urgent = ["sbatch", "--partition=urgent", f"--cpus-per-task={os.environ['SLURM_TEST_CPUS']}", "--mem=100M", "--output=/dev/null"]
        return subprocess.run([*urgent, f"--wrap=sleep {self.rng.uniform(1, 10):.1f}"], capture_output=True).returncode == 0

    def _crash_node(self) -> bool:
        """As if the node lost its power: slurmd, the steps it watches and all their processes."""
        if not jobs("RUNNING"):
            return False
        return self._restart("slurmd", also=lambda: [_kill(pid) for step in _steps() for pid in (step, *_descendants(step))])

    def _restart(self, daemon: str, also: Callable[[], object] = lambda: None) -> bool:
        """SIGKILL, some seconds without it, and start it again."""
        try:
            pid = int((DAEMONS / f"{daemon}.pid").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return False
        if daemon.encode() not in chaos.command_line(pid):
            return False
        _kill(pid)
        also()
        time.sleep(self.rng.uniform(0, 8))
        start_cluster()
        return True

    def _kill_sweep(self) -> bool:
        if self.sweep is None or self.sweep.poll() is not None:
            return False
        self.sweep.kill()
        return True


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _steps() -> list[int]:
    """The processes by which slurmd watches this cluster's running jobs; they outlive it."""
    mine = set(slurm("squeue", "--me", "--noheader", "--format=%A"))
    pids = [int(process.name) for process in Path("/proc").glob("[0-9]*")]
    named = {pid: re.match(rb"slurmstepd: \[(\d+)\.", chaos.command_line(pid)) for pid in pids}
    return [pid for pid, found in named.items() if found and found[1].decode() in mine]


def _descendants(pid: int) -> list[int]:
    return [one for child in chaos.children(pid) for one in (child, *_descendants(child))]


def disturb(words: list[str], results: Path, given: argparse.Namespace, told: dict) -> None:
    """Sweep under fire until nothing is left; counts are added to `told`. Raises TimeoutError after `given.limit` seconds."""
    rng, deadline, every = random.Random(given.seed + 1000 * told["sweeps"]), time.monotonic() + given.limit, given.every
    disturbances, before, restarts = Disturbances(rng, told), told["requeues"], {}
    next_shot, seen = time.monotonic() + rng.uniform(*every), chaos.written(results)
    while True:
        with open(results.with_suffix(".txt"), "a", encoding="utf-8") as output:
            disturbances.sweep = process = chaos.start(words, JOB, results, output)
        told["sweeps"] += 1
        try:
            while process.poll() is None:
                time.sleep(0.5)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not through after {given.limit:.0f} s")
                if disturbances.total() >= given.most or time.monotonic() < next_shot or chaos.written(results) == seen:
                    continue
                disturbances.one()
                next_shot, seen = time.monotonic() + rng.uniform(*every), chaos.written(results)
                restarts.update(_restarts())
        finally:
            process.terminate()
            told["requeues"] = before + sum((restarts | _restarts()).values())
        print(f"{time.strftime('%H:%M:%S')} the sweep ended with {process.returncode}", file=sys.stderr, flush=True)
        if process.returncode == 0:
            return
        time.sleep(1)


def _restarts() -> dict[str, int]:
    """How often SLURM has put each task back into the queue, as long as it remembers them."""
    found = (re.search(r"JobId=(\d+) .* Restarts=(\d+) ", line) for line in slurm("scontrol", "show", "job", "-o"))
    return {match[1]: int(match[2]) for match in found if match}


def _saved(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def drained() -> list[str]:
    """The jobs that do not leave the queue although no cell is left."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while (left := slurm("squeue", "--me", "--noheader", "--array", "--format=%i %T %r")) and time.monotonic() < deadline:
        time.sleep(1)
    return [f"still in the queue: {job}" for job in left]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=200, help=f"a multiple of {len(METHODS)}")
    parser.add_argument("--every", type=float, nargs=2, default=(10.0, 40.0), metavar="SECONDS", help="between two disturbances")
    parser.add_argument("--most", type=int, default=10**6, metavar="N", help="disturbances; then the sweep is left in peace")
    parser.add_argument("--cpus", type=int, default=4, help="of the cluster's node: so many tasks run at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=7200)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="results go there and stay; what lies there is gone on with")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the cluster is stopped, and what is kept can be gone on with
    words = chaos.grid(given.cells, METHODS)
    with tempfile.TemporaryDirectory() as scratch:
        place = (given.keep or Path(scratch)).resolve()
        disturbed, quiet = place / "disturbed", place / "quiet"
        disturbed.mkdir(parents=True, exist_ok=True)
        os.environ["SLURM_TEST_CPUS"] = str(given.cpus)
        start = time.monotonic()
        told = (
            dict.fromkeys(Disturbances(random.Random(), {}).kinds, 0)
            | {"sweeps": 0, "requeues": 0, "looks": 0, "seconds disturbed": 0}
            | _saved(place / "counts.json")
        )
        wrong, seen, watch = [], told.pop("problems", []), Watch(disturbed, _saved(place / "results.json"))
        start_cluster()
        watch.start()
        try:
            disturb(words, disturbed, given, told)
            wrong += drained()
        except TimeoutError as error:
            wrong.append(str(error))
        finally:
            told["looks"] += watch.looks
            told["seconds disturbed"] += round(time.monotonic() - start)
            (place / "counts.json").write_text(json.dumps({**told, "problems": [*seen, *watch.problems]}), encoding="utf-8")
            (place / "results.json").write_text(json.dumps(watch.results), encoding="utf-8")
            subprocess.run(["bash", SCRIPTS / "stop.sh"], check=True)
        watch.over.set()
        watch.join()
        watch.look()
        if chaos.sweep(words, 2, quiet).wait():
            print("the quiet sweep failed", file=sys.stderr)
            return 1
        wrong += [*seen, *watch.problems, *chaos.problems(words, disturbed, quiet)]
        measured, undisturbed = chaos.numbers(disturbed), chaos.numbers(quiet)
        submitted = re.findall(r"submitted (\d+) cells", disturbed.with_suffix(".txt").read_text(encoding="utf-8"))
        logs = [path.read_text(encoding="utf-8", errors="replace") for path in (disturbed / "jobs").glob("*_log.out")]
    found = {
        "cells": len(undisturbed), "seed": given.seed, "cpus": given.cpus, "every": given.every, "tasks": sum(map(int, submitted)),
        "tasks of the first array": int(submitted[0]), "starts of tasks": sum(log.count("Starting with JobEnvironment") for log in logs),
        "disturbances": Disturbances(random.Random(), told).total(), **told, "restarts": told["sweeps"] - 1,
        "differing cells": sum(measured.get(name) != undisturbed[name] for name in undisturbed), "problems": wrong,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
