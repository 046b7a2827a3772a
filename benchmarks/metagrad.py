"""The same metagradient, side by side: dpgbench, the create_graph unroll, reverse over reverse, and bergson's MAGIC if it is installed.

    python benchmarks/metagrad.py                       everything, an hour on two quiet cores
    python benchmarks/metagrad.py --steps 1 --repetitions 7 --signals head
    python benchmarks/metagrad.py --table               the table of all that was measured so far

All contestants run in one process, one after the other, `--repetitions` times over; figures are medians, so that a slow minute of the
machine hits all of them. Peak memory is measured in a process per contestant, less what that process held before the call.
Results are added to benchmarks/metagrad.json. Setting: GPT-2 of 4 layers and width 256, vocabulary 2048, batch 32 x 64 tokens, AdamW.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".json")
# For everybody: glibc must not hand large tensors back to the system after every operation, only to fetch zeroed pages for the next,
# and pages are 2 MB where the kernel grants them on request.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 35), "MALLOC_TOP_PAD_": str(1 << 26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}  # fmt: skip
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
NAMES = {
    "loop": "training alone, an ordinary loop", "train": "training alone, `dpgbench.training.train`", "ours": "**dpgbench**",
    "tight": "**dpgbench**, budget: T=1's peak and 16 states", "sqrt": "**dpgbench**, the same budget, `checkpoint=\"sqrt\"`",
    "unroll": "`create_graph` unroll", "reverse": "reverse over reverse, states kept", "magic": "bergson MAGIC, all states",
    "magic_sqrt": "bergson MAGIC, sqrt checkpoints",
}  # fmt: skip


def setting(steps: int, signal: str):
    """Model, batches, signal and optimizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dpgbench.metagrad.training import AdamW

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2048, n_positions=64, n_embd=256, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    batches = [{key: ids for key in ("input_ids", "labels")} for ids in torch.randint(0, 2048, (steps + 1, 32, 64))]
    held_out = {key: ids[:8] for key, ids in batches.pop().items()}

    def head(model):
        return -model.lm_head.weight.norm()

    def loss(model):
        return -model(**held_out).loss

    return model, batches, {"head": head, "held-out": loss}[signal], AdamW(lr=1e-4, eps_root=1e-6)


def contestants(tape_bytes: int, state_bytes: int):
    """Name -> function of (model, batches, signal, optimizer)."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import peers

    from dpgbench.metagrad import metagradients
    from dpgbench.metagrad.training import train

    def ours(**options):
        return lambda *arguments: metagradients(*arguments, **options).rewards

    tight = tape_bytes + 16 * state_bytes
    found = {
        "loop": peers.plain_loop,
        "train": lambda model, batches, _, optimizer: train(model, batches, optimizer) and None,
        "ours": ours(mode="tape"),
        "tight": ours(memory_budget=tight),
        "sqrt": ours(memory_budget=tight, checkpoint="sqrt"),
        "unroll": peers.unroll,
        "reverse": ours(mode="reverse"),
    }
    if peers.magic_is_installed():
        found |= {"magic": peers.magic("all"), "magic_sqrt": peers.magic("sqrt")}
    return found


def sizes() -> tuple[int, int]:
    """Bytes of one step's tape, and of one state: parameters, gradient and two moments."""
    from dpgbench.metagrad import metagradients

    model, batches, signal, optimizer = setting(1, "head")
    out = metagradients(model, batches, signal, optimizer)
    return out.tape_bytes, out.held_bytes - out.tape_bytes


def timed(steps: int, signal: str, names: list[str], repetitions: int, clock: Callable[[], float]) -> Iterator[dict]:
    """What is known after every call: medians of the seconds and of the ratios to training in the same repetition, and how far the rewards
    are from the unroll's, or from dpgbench's where the unroll does not take part (of the largest reward).
    """
    functions = {name: function for name, function in contestants(*sizes()).items() if name in (*names, "train")}
    functions = {"train": functions.pop("train"), **functions}
    arguments = setting(steps, signal)
    for function in functions.values():  # imports, first allocations, one-time checks
        function(*setting(1, signal))
    seconds, rewards = {name: [] for name in functions}, {}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = clock()
            rewards[name] = function(*arguments)
            seconds[name].append(clock() - start)
            yield _summary(seconds, rewards)


def _summary(seconds: dict[str, list[float]], rewards: dict) -> dict:
    reference, entries = rewards.get("unroll", rewards.get("ours")), {}
    for name, times in seconds.items():
        if times:
            ratios = [mine / training for mine, training in zip(times, seconds["train"], strict=False)]
            entries[name] = {"seconds": statistics.median(times), "ratio": statistics.median(ratios), "repetitions": len(times)}
            if rewards[name] is not None and reference is not None:
                entries[name]["disagreement"] = float((rewards[name] - reference).abs().max() / reference.abs().max())
    return entries


def peak(name: str, steps: int, signal: str) -> float:
    """Megabytes that one contestant's call adds to its process at the peak. Runs in a process of its own."""
    function = contestants(*sizes())[name]
    arguments = setting(steps, signal)

    def read(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the sizing run above has freed, glibc still holds: it would hide what this call takes
    before = read("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    function(*arguments)
    return (read("VmHWM") - before) / 1024


def floor(name: str, steps: int, signal: str) -> float | None:
    """What counting products allows, over 3F a training step: the first step 2F with a tape, 3F without; then 6F, 8F or 9F a step.

    For a head-only metric the last step's cotangent is the head's alone, which is nearly free for itself at T=1."""
    later = {"ours": 6, "unroll": 6, "tight": 8, "reverse": 9, "sqrt": 11}.get(name)
    if later is None or (steps == 1 and signal == "head"):
        return None
    first = 2 if name in ("ours", "unroll") or steps == 1 else 5 if name == "reverse" else 3
    held_out = 3 / 4 if signal == "held-out" else 0  # a quarter of a batch
    return (3 * steps + later * (steps - 1) + first + held_out) / (3 * steps)


def table(stored: dict) -> str:
    """Markdown: ratios to training alone (`train`), floor, peak memory, agreement."""
    cells = stored["cells"]
    lines = []
    for signal in ("head", "held-out"):
        steps = sorted({int(key.split()[0]) for key in cells if key.split()[1] == signal})
        if not steps:
            continue
        said = {"head": "a metric of the LM head alone", "held-out": "held-out loss"}[signal]
        lines += [
            f"| {said} | " + " | ".join(f"T={t}" for t in steps) + f" | floor at T={steps[-1]} | peak at T={steps[-1]} | disagreement |"
        ]
        lines += ["|---|" + "---|" * (len(steps) + 3)]
        for name in NAMES:
            ratios = []
            for t in steps:
                cell = cells[f"{t} {signal}"]
                ratios.append(f"{cell[name]['ratio']:.2f}" if "ratio" in cell.get(name, {}) else "")
            last = cells[f"{steps[-1]} {signal}"].get(name, {})
            if not any(ratios):
                continue
            bound = floor(name, steps[-1], signal)
            worst = max((cells[f"{t} {signal}"].get(name, {}).get("disagreement", 0.0) for t in steps), default=0.0)
            columns = [
                f"{bound:.2f}" if bound else "",
                f"{last['peak_mb'] / 1000:.2f} GB" if "peak_mb" in last else "",
                f"{worst:.0e}" if worst else "",
            ]
            lines.append(f"| {NAMES[name]} | " + " | ".join(ratios + columns) + " |")
        lines.append("")
    return "\n".join(lines)


def save(stored: dict) -> None:
    RESULTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--signals", nargs="*", default=["head", "held-out"])
    parser.add_argument("--only", nargs="*", default=list(NAMES), help="contestants, by their short names")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU seconds, for a machine that is shared; with --threads 1")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--peak", nargs=3, metavar=("NAME", "T", "SIGNAL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"cells": {}}
    if options.table:
        print(table(stored))
        return
    if "MALLOC_TOP_PAD_" not in os.environ:  # glibc reads these when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.peak:
        name, steps, signal = options.peak
        with contextlib.redirect_stdout(sys.stderr):
            megabytes = peak(name, int(steps), signal)
        print(megabytes)
        return
    stored["versions"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "clock": options.clock,
    }
    for signal in options.signals:
        for steps in options.steps:
            cell = stored["cells"].setdefault(f"{steps} {signal}", {})
            if not options.no_times:
                for entries in timed(steps, signal, options.only, options.repetitions, CLOCKS[options.clock]):
                    for name, entry in entries.items():
                        cell[name] = {**cell.get(name, {}), **entry}
                    save(stored)
            for name in options.only:
                if options.no_memory or name not in contestants(0, 0):
                    continue
                words = [sys.executable, __file__, "--threads", str(options.threads), "--peak", name, str(steps), signal]
                said = subprocess.run(words, capture_output=True, encoding="utf-8", check=True).stdout
                cell.setdefault(name, {})["peak_mb"] = float(said.split()[-1])
            save(stored)
    print(table(stored))


if __name__ == "__main__":
    main()
