"""How processor time and memory grow: metagradients with steps, texts and model; status, dry run and report with finished cells.

    python benchmarks/growth.py metagradients           a table, and the figure docs/growth.png
    python benchmarks/growth.py cells --seeds 500       40 cells a seed, made up, in a temporary folder; then each command on them

Metagradients: GPT-2 of 2 layers, AdamW, Phi a held-out loss; each point is the median of `--repetitions` runs in this one process, in
processor seconds, and each curve is printed with the exponent of its upper half (1: linear). The cells are made up, not computed: files as
a finished cell of 60 steps and 8 snapshots leaves them, with random numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "growth.png"
STEPS = (1, 2, 4, 8, 16, 32, 64)
TEXTS = (16, 32, 64, 128, 256, 512)
WIDTHS = (64, 128, 192, 256, 384, 512)
GRID = ("task=all", "method=base,dpg,naive,influence,prompt_only")
SNAPSHOTS = (0, 1, 2, 4, 8, 15, 30, 60)


# ---- metagradients


def seconds_of(steps: int, texts: int, width: int, repetitions: int) -> tuple[float, int]:
    """Median processor seconds of a metagradient through `steps` steps on `texts` texts of 16 tokens; the model's parameters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from dpgbench.metagrad import metagradients
    from dpgbench.metagrad.training import AdamW

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=16, n_embd=width, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    *batches, held_out = ({key: ids for key in ("input_ids", "labels")} for ids in torch.randint(0, 256, (steps + 1, texts // steps, 16)))
    held_out = {key: ids[:4] for key, ids in held_out.items()}

    def signal(target: torch.nn.Module) -> torch.Tensor:
        return -target(**held_out).loss

    taken = []
    for _ in range(repetitions + 1):
        clock = time.process_time()
        metagradients(model, batches, signal, AdamW(lr=1e-3, eps_root=1e-7))
        taken.append(time.process_time() - clock)
    return statistics.median(taken[1:]), sum(parameter.numel() for parameter in model.parameters())  # the first one warms up


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope over the upper half of the points, on logarithms."""
    half = len(sizes) // 2
    return statistics.linear_regression([math.log(size) for size in sizes[half:]], [math.log(value) for value in seconds[half:]]).slope


def metagradients_curves(repetitions: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: list[tuple[str, list[float], list[float]]] = []
    found = [seconds_of(steps, 8 * steps, 64, repetitions)[0] for steps in STEPS]
    curves.append(("steps T, 8 texts each", list(STEPS), found))
    found = [seconds_of(2, texts, 64, repetitions)[0] for texts in TEXTS]
    curves.append(("texts N, T=2", list(TEXTS), found))
    pairs = [seconds_of(2, 64, width, repetitions) for width in WIDTHS]
    curves.append(("parameters, T=2, N=64", [size for _, size in pairs], [value for value, _ in pairs]))
    figure = Figure(figsize=(9, 2.8), dpi=100)
    FigureCanvasAgg(figure)
    for axes, (name, sizes, seconds) in zip(figure.subplots(1, 3), curves, strict=True):
        slope = exponent(sizes, seconds)
        print(f"| {name} | {' | '.join(f'{size:,.0f}: {value:.3g} s' for size, value in zip(sizes, seconds, strict=True))} | {slope:.2f} |")
        axes.loglog(sizes, seconds, "o-", markersize=4)
        axes.loglog(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], "--", color="grey", linewidth=1)
        axes.set(xlabel=name, title=f"exponent {slope:.2f}")
        axes.title.set_fontsize(9)
    figure.axes[0].set_ylabel("processor seconds")
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Software": None})


# ---- cells


def make_up(results: Path, seeds: int) -> int:
    """Folders of finished cells, 40 a seed. Returns how many."""
    from omegaconf import OmegaConf

    from dpgbench import config

    words, rng, stand_in = [*GRID, f"seed=range(0,{seeds})", "name=growth"], random.Random(0), 123_454_321
    request, specs = config.read([*words, f"results={results}"], sweep=True), {}
    for cell in request.cells:
        spec = cell.spec
        folder, key = results / "runs" / spec.folder, (spec.task.label, spec.method.label)
        folder.mkdir(parents=True)
        specs[key] = specs.get(key) or OmegaConf.to_yaml(OmegaConf.create({**spec.config, "seed": stand_in}))
        snapshots = [
            {
                "snapshot": step, "phi": rng.gauss(step / 60, 1), "measures": {"made_up": rng.gauss(step / 60, 1), "another": rng.random()},
                "flops": 1e9 * (step + 1), "flops_by_phase": {"generate": 5e8 * (step + 1), "deployment": 5e8 * (step + 1)},
                "tokens_generated": 100 * (step + 1), "tokens_trained": 100 * step, "seconds": float(step),
            }
            for step in SNAPSHOTS
        ]  # fmt: skip
        lines = [{"step": step, "phi": 0.1, "texts": ["the cat sleeps."] * 4, "flops": 1e9} for step in range(60)]
        lines += [{"snapshot": step} for step in SNAPSHOTS]
        result = {
            "schema": 1, "hash": spec.hash, "lines": len(lines), "headline": "made_up", "higher_is_better": True, "snapshots": snapshots,
            "texts": ["the cat sleeps in the house."] * 12, "seconds_total": 100.0,
        }  # fmt: skip
        env = {"dpgbench": "0", "commit": "", "python": "3", "packages": {}, "machine": "", "device": "cpu"}
        (folder / "spec.yaml").write_text(specs[key].replace(str(stand_in), str(spec.seed)), encoding="utf-8")
        (folder / "env.json").write_text(json.dumps(env), encoding="utf-8")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (results / "runs" / "growth.sweep.json").write_text(json.dumps(words), encoding="utf-8")
    return len(request.cells)


def measured(*words: str) -> str:
    """A command in a process of its own: processor seconds and peak memory."""
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pid = os.posix_spawn(sys.executable, [sys.executable, "-m", "dpgbench", *words], environment, file_actions=silent)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{' '.join(words)}: exit code {os.waitstatus_to_exitcode(status)}")
    return f"{usage.ru_utime + usage.ru_stime:.1f} s, {usage.ru_maxrss / 1024:.0f} MB"


def cells_growth(seeds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        count = make_up(Path(folder), seeds)
        grid = (*GRID, f"seed=range(0,{seeds})", "name=growth")
        for words in (("status", "name=growth"), ("sweep", *grid, "--dry-run"), ("report", "name=growth", "--format", "json")):
            print(
                f"| {words[0]}{' --dry-run' if words[0] == 'sweep' else ''} | {count:,} cells | {measured(*words, f'results={folder}')} |"
            )
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("metagradients", "cells"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=500)
    options = parser.parse_args()
    if options.what == "metagradients":
        metagradients_curves(options.repetitions)
    else:
        cells_growth(options.seeds)


if __name__ == "__main__":
    main()
