"""Which cells `check estimator` can measure side by side: methods on one task, one seed and the same completions. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.settings import LOSS_TYPES
from dpgbench.plugins.registry import Registry

BATCHES, TEXTS = 12, 48  # measured by default: independent batches, and texts left out in turn
MANY, OF_MANY = 3, {"batches": 8, "texts": 32}  # from so many methods on: each is paid for in every batch
SAME = ("completions", "group_size", "rollout_batch", "minibatch", "loss_type", "lora")  # of the policy: what says which texts, and g


def usual_counts(methods: int) -> dict[str, int]:
    """`batches` and `texts` where the user names none."""
    return OF_MANY if methods >= MANY else {"batches": BATCHES, "texts": TEXTS}


def check_together(specs: Sequence[RunSpec], registry: Registry, batches: int, texts: int) -> None:
    """Raises UserError for a method without rewards, and for cells that differ in more than their methods' own options."""
    first = specs[0]
    for spec in specs:
        _check_method(spec, registry)
        if (spec.config["task"], spec.seed) != (first.config["task"], first.seed):
            raise UserError(f"task={spec.task.label} seed={spec.seed}: one task and one seed at a time, next to {first.task.label}")
        label, before = spec.method.label, first.method.label
        for name in SAME:
            ours, theirs = spec.method.policy.get(name), first.method.policy.get(name)
            if ours != theirs:
                raise UserError(f"policy.{name}={ours}: {before} has {theirs}, and all are measured on the same texts; write one value")
        if spec.config["training"] != first.config["training"] or spec.config["scale"] != first.config["scale"]:
            raise UserError(f"method={label}: its training or scale differs from that of {before}; measure them one by one")
    labels = [spec.method.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"method={label}: named {labels.count(label)} times with other options; give each a label, method.label=mine")
    size = first.method.policy.completions
    if not batches <= texts <= batches * size:
        raise UserError(f"texts={texts}: from one text of each of the {batches} batches to all {size}; write texts={4 * batches}")


def _check_method(spec: RunSpec, registry: Registry) -> None:
    if "rewards" not in registry.find("method", spec.method.name).defines:
        able = [file.name for file in registry.files("method") if "rewards" in file.defines]
        raise UserError(
            f"method={spec.method.name}: says no rewards that a policy is trained with, so there is no policy gradient; "
            f"write method={','.join(able)}, or let the method define `rewards`"
        )
    if spec.method.get("policy") is None:
        raise UserError(f"method={spec.method.label}: has no section `policy`; add the line `policy: ${{policy}}` to its YAML")
    loss_type = spec.method.policy.loss_type
    if loss_type not in LOSS_TYPES:
        raise UserError(f"policy.loss_type={loss_type}: its gradient is not known here; {did_you_mean(loss_type, LOSS_TYPES)}")
