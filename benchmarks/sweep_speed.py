"""A whole sweep with two trees of dpgbench, one after the other and in turns: processor seconds of everything, memory of its workers.

    python benchmarks/sweep_speed.py OLD NEW [key=value ...] [--repeats 1]

OLD and NEW are checkouts (`git worktree add ../old HEAD~20`, say). Each turn is `sweep ... launcher=local launcher.workers=2` in a process
of its own, with results in an empty folder. Printed for each turn: processor seconds of the sweep and of all its processes, imports
included; the largest resident set that any of them ever had; and the resident set of the largest worker at the end of each cell. At the
end: whether the cells of both trees wrote the same metrics, byte for byte, and the ratio. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # processes whose parent has ended become ours, and their time is counted
SMALL = (
    "task=l2_norm,language", "method=base,dpg,naive,active_inheritance,prompt_only", "n=16", "search=2", "search_texts=16", "steps=2",
    "completions=32", "group_size=4", "deployment_texts=64", "snapshots=2",
)  # fmt: skip
POLL_SECONDS = 0.1
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """Bytes; 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def descendants(pid: int) -> Iterator[int]:
    try:
        lists = [(task / "children").read_text(encoding="ascii") for task in Path(f"/proc/{pid}/task").iterdir()]
        children = [int(child) for words in lists for child in words.split()]
    except OSError:
        return
    for child in children:
        yield child
        yield from descendants(child)


def turn(tree: Path, words: list[str], results: Path) -> dict:
    """One sweep: processor seconds, peak bytes, and bytes of the largest worker as each cell is done."""
    command = [sys.executable, "-m", "dpgbench", "sweep", *words, "launcher=local", "launcher.workers=2", f"results={results}"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL)
    done, after = set(), []
    seconds, peak, code, running = 0.0, 0, None, True
    while running:
        time.sleep(POLL_SECONDS)
        new = {path.parent.name for path in results.glob("runs/*/result.json")} - done
        if new:
            done |= new
            after += [max(map(resident, descendants(process.pid)), default=0)] * len(new)
        try:
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    break
                seconds, peak = seconds + usage.ru_utime + usage.ru_stime, max(peak, usage.ru_maxrss * 1024)
                code = os.waitstatus_to_exitcode(status) if pid == process.pid else code
        except ChildProcessError:
            running = False
    if code:
        sys.exit(f"{tree}: the sweep ended with exit code {code}")
    return {"seconds": seconds, "peak": peak, "after": after, "cells": len(done)}


def same_metrics(first: Path, second: Path) -> tuple[int, int]:
    """How many cells both have, and of how many the metrics are the same."""
    cells = {path.parent.name: path for path in first.glob("runs/*/metrics.jsonl")}
    both = [(path, second / "runs" / name / path.name) for name, path in cells.items() if (second / "runs" / name / path.name).exists()]
    return len(both), sum(a.read_bytes() == b.read_bytes() for a, b in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs=2, type=Path)
    parser.add_argument("words", nargs="*", default=[], help=f"of the sweep (default: {' '.join(SMALL)})")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    taken: dict[Path, list[float]] = {tree: [] for tree in options.trees}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            for number, tree in enumerate(options.trees):
                found = turn(tree.resolve(), options.words or list(SMALL), Path(scratch) / f"{number}.{repeat}")
                taken[tree].append(found["seconds"])
                after = " ".join(f"{size / 1e6:.0f}" for size in found["after"])
                print(f"{tree}: {found['seconds']:.1f} processor seconds, {found['cells']} cells, peak {found['peak'] / 1e6:.0f} MB")
                print(f"  largest worker at the end of each cell, MB: {after}", flush=True)
        cells, same = same_metrics(Path(scratch) / "0.0", Path(scratch) / "1.0")
        print(f"metrics: {same} of {cells} cells the same")
    old, new = (statistics.median(taken[tree]) for tree in options.trees)
    print(f"median of {options.repeats}: {old:.1f} and {new:.1f} processor seconds, {old / new:.2f} times as fast")


if __name__ == "__main__":
    main()
