"""Turns a cell's `training` settings into an optimizer, settings of the metagradient engine, and torch's matrix-product precision."""

from __future__ import annotations

from dpgbench.core.settings import Training
from dpgbench.metagrad.optimizers import SGD, AdamW
from dpgbench.metagrad.settings import EngineSettings


def optimizer_of(training: Training, name: str | None = None, lr: float | None = None) -> SGD | AdamW:
    """The target's optimizer as configured, or another with the same constants."""
    lr = lr or training.lr
    if (name or training.optimizer) == "sgd":
        return SGD(lr=lr)
    return AdamW(lr, tuple(training.betas), training.eps, training.eps_root, training.weight_decay)


def engine_settings(training: Training, *, data_parallel: bool = False) -> EngineSettings:
    """The metagradient engine's settings as configured; cells stored before there were any get the defaults.

    To the engine tf32 is full precision: how a GPU multiplies float32 numbers is the process's setting, not a step's (`matmul_precision`).
    """
    given = training.plain()
    precision = given.get("precision", "full")
    return EngineSettings(
        reduction=training.reduction,
        precision="full" if precision == "tf32" else precision,
        micro_batch=training.micro_batch,
        memory_budget=given.get("memory_budget"),
        checkpoint=given.get("checkpoint") or "all",
        offload=given.get("offload"),
        data_parallel=data_parallel,
    )


def matmul_precision(training: Training) -> str:
    """torch's word for how float32 matrices are multiplied in a cell, the generator's too: "highest", or with tf32 "high"."""
    return "high" if training.plain().get("precision") == "tf32" else "highest"
