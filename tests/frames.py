"""Hand-made suite frames that the tests of the report share."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

COMMAND = "python -m dpgbench report suite=demo"
ENV = json.dumps({"python": "3.11.2", "versions": {"torch": "2.13.0"}, "git_commit": "0123abc", "device": "cpu"})


def row(task="toy", method="base", label=None, seed=0, step=0, value=0.0, **more):
    """One row of a frame: a finished snapshot of a task led by `acc`, unless `more` says otherwise."""
    label = label or method
    return {
        "cell": f"{task}.{label}.s{seed}", "task": task, "task_label": task, "method": method, "method_label": label, "seed": seed,
        "status": "done", "reason": None, "step": step, "flops": 1e9, "flops_by_phase": json.dumps({"rollouts": 8e8, "deployment": 2e8}),
        "tokens_generated": 1500.0, "tokens_trained": 0.0, "seconds": 4.25, "phi": value - 1, "headline": "acc", "higher_is_better": True,
        "metric:acc": value, "texts": None, "picture": None, "spec": None, "env": None,
    } | more  # fmt: skip


def hole(status, reason, **more):
    """The row of a cell without a result."""
    nothing = {name: None for name in ("phi", "headline", "higher_is_better", "flops_by_phase")}
    numbers = {name: np.nan for name in ("step", "flops", "tokens_generated", "tokens_trained", "seconds", "metric:acc")}
    return row(**more) | nothing | numbers | {"status": status, "reason": reason}


def small_frame():
    """One task, 3 seeds: base, dpg with a curve, two methods with one snapshot each, failed, missing and skipped cells."""
    rows = [row(seed=seed, value=value, flops=1e7) for seed, value in enumerate((0.1, 0.2, 0.3))]
    rows += [row(method="dpg", seed=seed, step=1, value=0.2, flops=1e8) for seed in range(3)]
    rows += [row(method="dpg", seed=seed, step=9, value=value, flops=1e10, tokens_trained=2.5e6, seconds=1200)
             for seed, value in enumerate((0.6, 0.8, 1.0))]  # fmt: skip
    rows += [row(method="best", label="best_n4", seed=seed, step=4, value=value, flops=1e9) for seed, value in enumerate((0.3, 0.4, 0.2))]
    rows += [row(method="late", seed=seed, value=value, flops=1e12) for seed, value in enumerate((0.0, 0.3, 0.3))]
    rows += [hole("failed", "out of memory | step <3>", method="naive", seed=0)]
    rows += [hole("missing", None, method="naive", seed=seed) for seed in (1, 2)]
    rows += [hole("skipped", "needs a text target", method="levenshtein", seed=seed) for seed in range(3)]
    return pd.DataFrame(rows)


def everything_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def demo_picture(rng, accuracy):
    figure = Figure(figsize=(2.1, 1.8), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.where(rng.random((6, 7)) < accuracy, 1, -1), cmap="coolwarm", vmin=-1, vmax=1)
    axes.set_xticks([]), axes.set_yticks([])
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


def demo_frame(seeds=3):
    """Two tasks as a real suite would store them: curves that saturate, best-of-n as single points, one failed cell."""
    rng = np.random.default_rng(5)
    pictures = {level: demo_picture(rng, level) for level in (0.5, 0.75, 0.95)}
    rows = []
    for task, headline, start, end in (("sixseven", "pixel_accuracy", 0.41, 0.93), ("language_de", "share_in_language", 0.01, 0.97)):
        for seed in range(seeds):
            shift = rng.normal(0, 0.02)
            steps = (0, 5, 10, 20, 30, 40, 50, 60)
            plans = {
                "base": [(0, 0.0, start)],
                "active_inheritance_n4": [(1, 2.1e10, start + 0.10)],
                "active_inheritance_n16": [(1, 8.2e10, start + 0.17)],
                "dpg": [(s, 6e9 + 4.2e9 * s, start + (end - start) * (1 - np.exp(-s / 18))) for s in steps],
            }
            for label, points in plans.items():
                method = label.partition("_n")[0]
                if (task, label, seed) == ("language_de", "active_inheritance_n16", 1):
                    reason = 'Traceback (most recent call last):\n  File "runner.py", line 88\nRuntimeError: out of memory'
                    rows.append(hole("failed", reason, task=task, method=method, label=label, seed=seed))
                    continue
                for step, flops, level in points:
                    value = float(np.clip(level + shift + rng.normal(0, 0.015), 0, 1))
                    last = step == points[-1][0]
                    more = {"headline": headline, "metric:acc": np.nan, f"metric:{headline}": value, "flops": flops, "phi": value - 1.2}
                    more |= {"tokens_generated": 640.0 * max(step, 4), "tokens_trained": 640.0 * step, "seconds": 0.6 * step + 2}
                    if method == "dpg":
                        phases = {"rollouts": 0.3, "inner training": 0.25, "metagradients": 0.3, "policy": 0.1, "deployment": 0.05}
                        more |= {"flops_by_phase": json.dumps({name: share * flops for name, share in phases.items()})}
                    if last:
                        texts = [f"{label} s{seed}: der Hund sieht heute einen Baum im Park .", "die Katze malt ein Haus ."]
                        texts += ["the dog sees a tree <script>alert(1)</script>"]
                        spec = f"method: {method}\ntask: {task}\nscale: tiny\nseed: {seed}\noptions:\n  lr: 1.0e-3  # ours\n"
                        more |= {"texts": json.dumps(texts), "spec": spec, "env": ENV}
                    if last and task == "sixseven":
                        more |= {"picture": pictures[0.95 if method == "dpg" else 0.75 if "n16" in label else 0.5]}
                        more |= {"task_description": "The LM head's change spells 67 in a 6x7 patch."}
                    rows.append(row(task=task, method=method, label=label, seed=seed, step=step, **more))
    rows += [hole("skipped", "embedding rewards need a text target", task="sixseven", method="embedding", seed=s) for s in range(seeds)]
    return pd.DataFrame(rows)
