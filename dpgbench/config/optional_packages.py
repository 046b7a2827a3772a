"""What a cell's settings ask for beyond the installed requirements, looked up by name and without loading any of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from dpgbench.bench.tracking import PACKAGES
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError


def installed(name: str) -> bool:
    """Whether a package of this name can be imported."""
    return importlib.util.find_spec(name) is not None


def check_cells(specs: Iterable[RunSpec]) -> None:
    """`check` for all of them."""
    for spec in specs:
        check(spec)


def check(spec: RunSpec) -> None:
    """Raises UserError for a package that is asked for and missing."""
    policy = spec.method.get("policy")
    if policy is None:
        return
    for tracker in policy.get("report_to", []):
        if not any(map(installed, PACKAGES[tracker])):
            raise UserError(
                f"policy.report_to=[{tracker}]: {tracker} is not installed; `pip install {PACKAGES[tracker][0]}`, or leave it out"
            )
    if policy.get("rollout") == "vllm" and not installed("vllm"):
        raise UserError("policy.rollout=vllm: vllm is not installed; `pip install 'trl[vllm]'`, or write policy.rollout=transformers")
