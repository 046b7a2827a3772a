"""The metagradient engine on one GPU: its price in units of the training it differentiates, its share of the card, its waiting.

    python benchmarks/gpu_engine.py --out results/gpu/engine.json
    python benchmarks/gpu_engine.py --smoke                          the same on small sizes, on a CPU if there is no GPU

A GPT-2 of 12 layers and width 768 (vocabulary 50,257, GPT-2's own), batches of 32 texts of 128 tokens, AdamW, through T = 1, 4 and 16
steps, for a metric of the LM head alone and for a held-out loss, with float32 products, with TF32 and with bfloat16. Everything runs in
one process; contestants take turns, `--repetitions` times over, and a ratio is a median of ratios within a repetition. "Share of the
card" is FLOPs (counted by torch, `FlopCounterMode`) over seconds over the rate of one large square product in the same arithmetic,
measured here. Memory is torch's peak less what was allocated before. Waiting is what torch's sync debug mode reports of one call.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import peers  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from dpgbench.metagrad import metagradients  # noqa: E402
from dpgbench.metagrad.training import AdamW, train  # noqa: E402

PRECISIONS = {  # name: (torch's matrix-product setting, the engine's precision, the type of a plain product)
    "fp32": ("highest", "full", torch.float32),
    "tf32": ("high", "full", torch.float32),
    "bf16": ("high", "bf16", torch.bfloat16),
}
FULL = {"width": 768, "layers": 12, "vocabulary": 50257, "texts": 32, "length": 128, "square": 8192}
SMOKE = {"width": 32, "layers": 2, "vocabulary": 199, "texts": 4, "length": 16, "square": 256}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def product_rate(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of one square product of random matrices: the median of ten after three."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    taken = [seconds_of(lambda: a @ b) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(taken)


def setting(sizes: dict[str, int], steps: int, signal: str):
    """Model, batches, signal and optimizer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes["vocabulary"], n_positions=sizes["length"], n_embd=sizes["width"], n_layer=sizes["layers"],
        n_head=max(1, sizes["width"] // 64), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().to(DEVICE)
    ids = torch.randint(0, sizes["vocabulary"], (steps + 1, sizes["texts"], sizes["length"]), device=DEVICE)
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    held_out = {key: value[: sizes["texts"] // 4] for key, value in batches.pop().items()}

    def head(model):
        return -model.lm_head.weight.norm()

    def loss(model):
        return -model(**held_out).loss

    return model, batches, {"head": head, "held-out": loss}[signal], AdamW(lr=1e-4, eps_root=1e-6)


def measured(sizes: dict[str, int], steps: int, signal: str, precision: str, repetitions: int, peak: float) -> dict:
    """Of each contestant: seconds, ratio to training, FLOPs, share of the card, memory, and rewards against the unroll's."""
    _, engine, _ = PRECISIONS[precision]
    model, batches, phi, optimizer = setting(sizes, steps, signal)
    contestants = {
        "train": lambda: train(model, batches, optimizer, precision=engine) and None,
        "dpgbench": lambda: metagradients(model, batches, phi, optimizer, precision=engine),
    }
    if precision == "fp32" and steps < 16:  # its graph of 16 steps would be the largest thing on the card
        contestants["unroll"] = lambda: peers.unroll(model, batches, phi, optimizer)
    found: dict[str, dict] = {name: {} for name in contestants}
    rewards = {}
    for name, call in contestants.items():
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            with FlopCounterMode(display=False) as counter:
                out = call()
        except torch.OutOfMemoryError as error:
            found[name]["failed"] = str(error).splitlines()[0]
            continue
        found[name]["flops"] = counter.get_total_flops()
        if GPU:
            found[name]["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        if out is not None:
            rewards[name] = getattr(out, "rewards", out).double().cpu()
            if name == "dpgbench":
                found[name]["modes"] = dict(Counter(out.modes))
        out = None
    alive = [name for name in contestants if "failed" not in found[name]]
    taken: dict[str, list[float]] = {name: [] for name in alive}
    for repetition in range(repetitions + 1):
        for name in alive:
            seconds = seconds_of(contestants[name])
            if repetition:  # the first warms up
                taken[name].append(seconds)
    for name, times in taken.items():
        found[name]["seconds"] = statistics.median(times)
        found[name]["ratio"] = statistics.median(mine / training for mine, training in zip(times, taken["train"], strict=True))
        found[name]["share_of_card"] = found[name]["flops"] / found[name]["seconds"] / peak
    if "unroll" in rewards:
        found["dpgbench"]["disagreement"] = float((rewards["dpgbench"] - rewards["unroll"]).abs().max() / rewards["unroll"].abs().max())
    return found


def waits(sizes: dict[str, int], steps: int, signal: str) -> dict[str, int]:
    """Where a call of `metagradients` makes the processor wait for the card, by line of ours, and how often."""
    arguments = setting(sizes, steps, signal)
    metagradients(*arguments)
    places: Counter[str] = Counter()

    def note(message, category, filename, lineno, *_):
        if "synchroniz" not in str(message):
            return
        ours = [frame for frame in traceback.extract_stack() if "/dpgbench/" in frame.filename]
        frame = ours[-1] if ours else None
        places[f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" if frame else f"{filename}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before, warnings.showwarning = warnings.showwarning, note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            metagradients(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = before
    return dict(places.most_common())


def table(stored: dict) -> str:
    lines = [
        "| metric | products | T | training, s | metagradients, s | ratio | share of the card: training | metagradients | peak GB "
        "| `create_graph` unroll | its peak GB | disagreement |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in stored["cells"].items():
        signal, precision, steps = key.split()
        ours, training, unroll = cell["dpgbench"], cell["train"], cell.get("unroll", {})
        if "ratio" not in ours:
            lines.append(f"| {signal} | {precision} | {steps} | {ours['failed']} |")
            continue
        agreed = f"{ours['disagreement']:.0e}" if "disagreement" in ours else ""
        peer = f"{unroll['ratio']:.2f}" if "ratio" in unroll else "out of memory" if unroll else ""
        lines.append(
            f"| {signal} | {precision} | {steps} | {training['seconds']:.3f} | {ours['seconds']:.3f} | **{ours['ratio']:.2f}** "
            f"| {training['share_of_card']:.0%} | {ours['share_of_card']:.0%} | {ours.get('peak_gb', 0):.1f} | {peer} "
            f"| {unroll.get('peak_gb', 0):.1f} | {agreed} |".replace("| 0.0 |  |", "| |  |")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--signals", nargs="*", default=["head", "held-out"])
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="small sizes, two steps at most")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else FULL
    if not GPU:
        torch.set_num_threads(1)  # more would wait for one another where the machine is shared
    steps = [count for count in options.steps if count <= 4] if options.smoke else options.steps
    stored: dict = {
        "device": torch.cuda.get_device_name() if GPU else "cpu", "torch": torch.__version__, "sizes": sizes,
        "products_flops_per_second": {}, "cells": {}, "waits": {},
    }  # fmt: skip

    def save() -> None:
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")

    for precision in options.precisions:
        setting_of_products, _, dtype = PRECISIONS[precision]
        torch.set_float32_matmul_precision(setting_of_products)
        rate = stored["products_flops_per_second"][precision] = product_rate(dtype, sizes["square"])
        for signal in options.signals:
            for count in steps:
                stored["cells"][f"{signal} {precision} {count}"] = measured(sizes, count, signal, precision, options.repetitions, rate)
                save()
    if GPU:
        torch.set_float32_matmul_precision("highest")
        for count in steps:
            stored["waits"][str(count)] = waits(sizes, count, "held-out")
        save()
    print(json.dumps(stored["products_flops_per_second"]))
    print(json.dumps(stored["waits"], indent=1))
    print(table(stored))


if __name__ == "__main__":
    main()
