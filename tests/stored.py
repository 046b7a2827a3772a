"""A finished cell as a run would leave it, written by hand in milliseconds: for tests of whoever reads such files."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from dpgbench import config

WORDS = ["task=l2_norm", "method=base", "deployment_texts=8", "deployment_steps=null"]


def write_cell(results: Path, *words: str, texts: tuple[str, ...] = ("the cat sleeps.",) * 8) -> Path:
    """The folder of a finished cell of `WORDS`, and of more words, under `results`."""
    (cell,) = config.read([*WORDS, *words], sweep=False).cells
    folder = results / "runs" / cell.spec.folder
    folder.mkdir(parents=True)
    line = {
        "snapshot": 0, "phi": -1.5, "measures": {"l2_norm_change": -0.25}, "flops": 1.0e9, "flops_by_phase": {"deployment": 1.0e9},
        "tokens_generated": 80, "tokens_trained": 80, "seconds": 0.5,
    }  # fmt: skip
    result = {
        "schema": 1, "hash": cell.spec.hash, "lines": 1, "headline": "l2_norm_change", "higher_is_better": False, "snapshots": [line],
        "texts": list(texts), "seconds_total": 1.5,
    }  # fmt: skip
    environment = {"dpgbench": "0", "commit": "", "packages": {"torch": "2"}, "processor": {}, "device": "cpu"}
    files = {
        "spec.yaml": OmegaConf.to_yaml(OmegaConf.create(dict(cell.spec.config))),
        "env.json": json.dumps(environment),
        "metrics.jsonl": json.dumps(line) + "\n",
        "timings.jsonl": json.dumps({"snapshot": 0, "seconds": 0.5}) + "\n",
        "deployment.jsonl": "".join(json.dumps({"prompt": "p", "text": text}) + "\n" for text in texts),
        "result.json": json.dumps(result),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
