"""Curves of a policy's steps for trackers that TRL reports to (`policy.report_to`), beside `metrics.jsonl`, which every cell has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = {  # of each tracker, by transformers' name for it; one of them must be installed
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
    "swanlab": ("swanlab",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
}


@contextmanager
def into(folder: Path, trackers: list[str]) -> Iterator[None]:
    """Inside, TensorBoard and wandb write their files to `folder`; a wandb run ends with the block, so that the next cell has its own."""
    if not trackers:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    places = {"TENSORBOARD_LOGGING_DIR": str(folder), "WANDB_DIR": str(folder)}
    places |= {name: os.environ.get(name, value) for name, value in (("WANDB_PROJECT", "dpgbench"), ("WANDB_SILENT", "true"))}
    before = {name: os.environ.get(name) for name in places}
    os.environ |= places
    try:
        yield
    finally:
        if "wandb" in trackers and "wandb" in sys.modules:
            sys.modules["wandb"].finish()
            sys.modules["wandb"].teardown()  # or it remembers the folder
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
