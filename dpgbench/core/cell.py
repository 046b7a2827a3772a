"""A cell: one task, method and seed with every setting, its hash and the name of its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpgbench.core.options import Options
from dpgbench.core.settings import Scale, Training

# What a cell's hash leaves out: settings that cost time and memory, or say who watches, and change no number. But one: where T > 1, a step
# that is recomputed for want of memory is charged for it, and so a budget in FLOPs may end a step earlier (docs/reliability.md).
SETTINGS_WITHOUT_EFFECT = {
    "training": ("memory_budget", "checkpoint", "offload"),
    "scale": ("keep_generator",),
    "policy": ("activation_checkpointing", "vllm_memory", "report_to"),
}
# Settings that were added when there were stored cells, at the value that stands for what those did, which keep their hash.
ADDED_SETTINGS = {
    "training": {"precision": "full"},
    "scale": dict.fromkeys(
        ("generator_revision", "target_revision", "max_prompt_tokens", "corpus_subset", "corpus_column", "corpus_revision")
    )
    | {"more_deployments": [], "wording": None, "held_out": "lambada"},
    "task": {"held_out_texts": 64},
    "method": {
        "lora": None,
        **{"credit": "text", "baseline": "group", "discount": 1.0},
        **{"damping": 0.1, "influence_texts": 512, "warmup_steps": 8},
        **{"over_references": "max", "edit_distance": "relative", "language_score": "identified"},
        "target_lr": None,
        "scored": "every",
    },
    "policy": {"rollout": "transformers", "lora": None, "rollout_batch": None, "best_of": 1},
}
# How a generator's texts are drawn and updated: raised where that changed what stored cells had. 2: no dropout, every end token, the full
# distribution, prompts padded on the left, float32 weights in training. The embedded generator's texts were those all along.
SAMPLER = 2


@dataclass(frozen=True)
class RunSpec:
    """One cell: a task, a method, a seed and every setting that changes its numbers, resolved."""

    config: Mapping[str, Any]
    """Sections `task`, `method`, `training`, `scale` (plain dicts with `name` and `version` in the first two), `seed`, and `budget` where
    there is one."""

    @property
    def task(self) -> Options:
        return Options(self.config["task"])

    @property
    def method(self) -> Options:
        return Options(self.config["method"])

    @property
    def training(self) -> Training:
        return Training(self.config["training"])

    @property
    def scale(self) -> Scale:
        return Scale(self.config["scale"])

    @property
    def budget(self) -> dict[str, float]:
        """The limits there are, by the names of `meter.Budget`."""
        return self.config.get("budget", {})

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @cached_property
    def hash(self) -> str:
        """Ten hex digits over everything that changes the numbers, and over nothing else. From here on `config` stays as it is."""
        relevant = json.loads(json.dumps(self.config))
        for section in ("task", "method"):
            relevant[section].pop("label", None)
            relevant[section].pop("file", None)  # `file_sha256` stands for it
        for own in ("corpus", "generator", "target"):
            if f"{own}_sha256" in relevant["scale"]:  # which stands for the path of a file or a folder
                relevant["scale"].pop(own)
        if (self.config["scale"]["generator"], relevant["scale"]["generator_dtype"]) != ("phrasebook", "float32"):
            relevant["scale"]["sampler"] = SAMPLER
        sections = {**relevant, "policy": relevant["method"].get("policy") or {}}
        for section, settings in SETTINGS_WITHOUT_EFFECT.items():
            for setting in settings:
                sections[section].pop(setting, None)
        for section, settings in ADDED_SETTINGS.items():
            for setting, before in settings.items():
                if sections[section].get(setting) == before:
                    sections[section].pop(setting, None)
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        """The cell's folder name under `results/runs/`."""
        return f"{self.task.label}.{self.method.label}.s{self.seed}.{self.hash}"


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: what to run, or the reason why it is skipped."""

    spec: RunSpec
    skip: str | None = None
