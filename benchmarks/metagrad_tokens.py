"""What metagradients of single tokens cost beside those of whole texts: CPU seconds, side by side in one process.

    python benchmarks/metagrad_tokens.py            a few minutes of CPU time
    python benchmarks/metagrad_tokens.py --table    the table of what was measured

Texts and tokens take turns, `--repetitions` times over, each first in half of them; a ratio is the median over repetitions of tokens over
texts. One thread. Results go to benchmarks/metagrad_tokens.json. Settings: the target of scale tiny on 128 texts of 22 tokens, and GPT-2 of
4 layers and width 256, vocabulary 2048, on 8 texts of 64; held-out loss, AdamW.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".json")
CASES = [("tiny", 1, "tape"), ("tiny", 4, "tape"), ("tiny", 4, "forward"), ("wide", 1, "tape")]
MODELS = {"tiny": "scale tiny's target", "wide": "GPT-2, 4 layers x 256"}


def setting(model: str, steps: int):
    """Model, batches, signal and optimizer."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from dpgbench.metagrad.training import AdamW, per_example_loss
    from dpgbench.worlds.phrasebook import WEIGHTS

    torch.manual_seed(0)
    if model == "tiny":
        target, texts, length = AutoModelForCausalLM.from_pretrained(WEIGHTS / "target", attn_implementation="eager"), 128 // steps, 22
    else:
        config = GPT2Config(
            vocab_size=2048, n_positions=64, n_embd=256, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
        )  # fmt: skip
        target, texts, length = GPT2LMHeadModel(config), 8, 64
    ids = torch.randint(0, target.config.vocab_size, (steps + 1, texts, length))
    *batches, held_out = ({"input_ids": part, "labels": part} for part in ids)
    return target.eval(), batches, lambda module: -per_example_loss(module, {}, **held_out).mean(), AdamW(lr=1e-4, eps_root=1e-6)


def measure(model: str, steps: int, mode: str, repetitions: int) -> dict:
    """Median CPU seconds of both, the ratio, its quartiles, and how far sums of tokens are from texts (of the largest text's)."""
    from dpgbench.metagrad import metagradients

    arguments, seconds = setting(model, steps), {False: [], True: []}
    rewards = {per_token: metagradients(*arguments, mode=mode, per_token=per_token).rewards for per_token in seconds}  # and one-time checks
    for repetition in range(repetitions):
        for per_token in (False, True) if repetition % 2 else (True, False):
            start = time.process_time()
            metagradients(*arguments, mode=mode, per_token=per_token)
            seconds[per_token].append(time.process_time() - start)
    ratios = [tokens / texts for texts, tokens in zip(*seconds.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    off = (rewards[True].sum(1) - rewards[False]).abs().max() / rewards[False].abs().max()
    return {
        "texts_seconds": statistics.median(seconds[False]), "tokens_seconds": statistics.median(seconds[True]), "ratio": middle,
        "quartiles": [low, high], "repetitions": repetitions, "disagreement": float(off),
    }  # fmt: skip


def table(stored: dict) -> str:
    lines = ["| model | T | mode | texts, CPU s | tokens / texts (quartiles) | n | sums disagree |", "|---|---|---|---|---|---|---|"]
    for key, cell in stored["cells"].items():
        model, steps, mode = key.split()
        low, high = cell["quartiles"]
        lines.append(
            f"| {MODELS[model]} | {steps} | {mode} | {cell['texts_seconds']:.2f} | {cell['ratio']:.3f} ({low:.3f} to {high:.3f}) |"
            f" {cell['repetitions']} | {cell['disagreement']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=16)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    stored = {"torch": torch.__version__, "cells": {}}
    for model, steps, mode in CASES:
        stored["cells"][f"{model} {steps} {mode}"] = measure(model, steps, mode, options.repetitions)
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(table(stored))


if __name__ == "__main__":
    main()
