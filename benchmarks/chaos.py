"""Kill workers at random until a sweep is through, then compare every number with a sweep that was left in peace.

    python benchmarks/chaos.py --cells 40 --workers 2

Every few seconds, once a cell has written something new, a worker process gets SIGKILL, one time in five the sweep itself; whenever a
sweep ends with cells left, it is started again with retry=failed. Passes if every cell is done, each row is in the collected parquet
once, and metrics and results equal the quiet run's, metrics.jsonl byte by byte. Prints its counts as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
CELL = ["completions=16", "group_size=4", "deployment_texts=16", "deployment_steps=null", "snapshots=3", "steps=4"]
ALWAYS = ["launcher.checkpoint_seconds=0.0", "retry=failed"]
SWEEP_SHARE = 0.2  # of the kills: the whole sweep, whose workers finish their cells without it


def grid(cells: int, methods: tuple[str, ...] = ("dpg", "active_inheritance")) -> list[str]:
    """Words for that many cells, as many of each method: a policy that makes checkpoints, and methods that start again."""
    seeds = ",".join(map(str, range(cells // len(methods))))
    return ["task=language", f"method={','.join(methods)}", "n=2", f"seed={seeds}", *CELL]


def sweep(words: list[str], workers: int, results: Path) -> subprocess.Popen:
    return start(words, ["launcher=local", f"launcher.workers={workers}"], results)


def start(words: list[str], launcher: list[str], results: Path, output: int | IO[str] = subprocess.DEVNULL) -> subprocess.Popen:
    command = [sys.executable, "-m", "dpgbench", "sweep", *words, *launcher, *ALWAYS, f"results={results}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def written(results: Path) -> int:
    """Bytes of all metrics files: what tells that something was done."""
    return sum(path.stat().st_size for path in results.glob("runs/*/metrics.jsonl"))


def workers_of(pid: int) -> list[int]:
    """The worker processes of a sweep: forks of a process that has imported what they need, or processes of their own."""
    born = children(pid)
    forks = [fork for child in born if b"forkserver" in command_line(child) for fork in children(child)]
    return forks + [child for child in born if b"spawn_main" in command_line(child)]


def children(pid: int) -> list[int]:
    try:
        lists = [(task / "children").read_text(encoding="ascii") for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [int(child) for words in lists for child in words.split()]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def disturb(words: list[str], workers: int, results: Path, every: tuple[float, float], seed: int, limit: float) -> dict[str, int]:
    """Sweep under fire until nothing is left; how often what was killed and started. Raises TimeoutError after `limit` seconds."""
    rng, deadline = random.Random(seed), time.monotonic() + limit
    told = {"sweeps": 0, "workers killed": 0, "sweeps killed": 0}
    while True:
        process = sweep(words, workers, results)
        told["sweeps"] += 1
        next_shot, seen = time.monotonic() + rng.uniform(*every), written(results)
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() > deadline:
                process.send_signal(signal.SIGTERM)
                raise TimeoutError(f"not through after {limit:.0f} s: {told}")
            if time.monotonic() < next_shot or written(results) == seen:  # on a busy machine a worker takes long to start
                continue
            next_shot, seen = time.monotonic() + rng.uniform(*every), written(results)
            if rng.random() < SWEEP_SHARE:
                process.kill()
                told["sweeps killed"] += 1
            elif living := workers_of(process.pid):
                os.kill(rng.choice(living), signal.SIGKILL)
                told["workers killed"] += 1
        if process.returncode == 0:
            return told


def numbers(results: Path) -> dict[str, tuple]:
    """What every finished cell measured, without its seconds."""
    found = {}
    for folder in sorted((results / "runs").glob("*.s[0-9]*")):
        if not (folder / "result.json").exists():
            continue
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        lines = [{key: value for key, value in line.items() if key != "seconds"} for line in result["snapshots"]]
        rollouts = folder / "rollouts.jsonl"
        found[folder.name] = (
            (folder / "metrics.jsonl").read_bytes(), rollouts.read_bytes() if rollouts.exists() else b"", lines, result["texts"],
        )  # fmt: skip
    return found


def difference(disturbed: tuple | None, quiet: tuple) -> str:
    """How a cell's numbers differ from the quiet run's; "" if they do not."""
    if disturbed is None:
        return "not done"
    return "" if disturbed == quiet else "differs from the quiet run"


def problems(words: list[str], results: Path, quiet: Path) -> list[str]:
    """What is wrong with the disturbed results; empty if nothing is."""
    import pandas

    disturbed, undisturbed = numbers(results), numbers(quiet)
    wrong = [f"{name}: {how}" for name in undisturbed if (how := difference(disturbed.get(name), undisturbed[name]))]
    wrong += [f"{name}: not in the quiet run" for name in disturbed if name not in undisturbed]
    subprocess.run([sys.executable, "-m", "dpgbench", "report", *words, f"results={results}"], cwd=ROOT, check=True, capture_output=True)
    frame = pandas.read_parquet(results / "sweep.parquet")
    wrong += [
        f"{cell}, step {step}: twice in the parquet" for cell, step in frame[frame.duplicated(["cell", "step"])][["cell", "step"]].values
    ]
    wrong += [f"{cell}: {status}" for cell, status in frame[frame.status != "done"][["cell", "status"]].values]
    rows = sum(len(content[2]) for content in undisturbed.values())
    return wrong if len(frame) == rows else [*wrong, f"{len(frame)} rows in the parquet, {rows} in the quiet run"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, nargs=2, default=(3.0, 12.0), metavar="SECONDS", help="between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=3600)
    given = parser.parse_args()
    words = grid(given.cells)
    with tempfile.TemporaryDirectory() as scratch:
        disturbed, quiet = Path(scratch) / "disturbed", Path(scratch) / "quiet"
        start = time.monotonic()
        if sweep(words, min(2, given.workers), quiet).wait():
            print("the quiet sweep failed", file=sys.stderr)
            return 1
        between = time.monotonic()
        told = disturb(words, given.workers, disturbed, tuple(given.every), given.seed, given.limit)
        end = time.monotonic()
        wrong = problems(words, disturbed, quiet)
        measured, undisturbed = numbers(disturbed), numbers(quiet)
    found = {
        "cells": len(undisturbed), "workers": given.workers, "seed": given.seed, "kills": told["workers killed"] + told["sweeps killed"],
        **told, "restarts": told["sweeps"] - 1, "differing cells": sum(measured.get(name) != undisturbed[name] for name in undisturbed),
        "problems": wrong, "seconds quiet": round(between - start), "seconds disturbed": round(end - between),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
