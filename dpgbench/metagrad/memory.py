"""How much the engine may keep between the forward and the reverse pass, what a tape weighs, and where states wait.

Budgets and sizes are in bytes, counted from tensors and not from the allocator, so that the same run makes the same choices twice.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEFAULT_BUDGET = 0.5  # of the device's memory
OFFLOADS = (None, "cpu", "disk")


def budget_bytes(memory_budget: int | float | None, device: torch.device) -> int:
    """Bytes for tapes and states: an int as it is, a float in [0, 1] as a share of the device's memory, None for half of it.

    A share is of all the memory there is, not of what happens to be free: choices, and with them the last bits of the rewards,
    must not hang on what else is running. Raises ValueError."""
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if number and isinstance(budget, float) and budget > 1 and budget.is_integer():
        budget = int(budget)  # 2e9 is a number of bytes too
    if not number or not math.isfinite(budget) or budget < 0 or (isinstance(budget, float) and budget > 1):
        raise ValueError(
            f"memory_budget={memory_budget!r}: it must be bytes (an integer >= 0) or a share of the device's memory (a float in [0, 1]);"
            " pass e.g. 0.5"
        )
    return int(budget * device_memory(device)) if isinstance(budget, float) else budget


def device_memory(device: torch.device) -> int:
    """All the memory of the device, for a CPU what the machine or the process's control group has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return total


def tensor_bytes(tree: Any) -> int:
    """Bytes of all distinct storages in a tree of tensors."""
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in _tensors(tree)}
    return sum(storages.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class OverBudget(Exception):
    """A tape outgrew its limit while it was being recorded; whatever was recorded is gone."""


class Scale:
    """Weighs what autograd saves; see `weighed`."""

    def __init__(self, limit: float, free: Iterable[Tensor]):
        self.limit, self.bytes = limit, 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in free}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
            if self.bytes > self.limit:
                raise OverBudget
        return tensor.detach()  # detached: a node that saves its own output must not keep itself alive


@contextmanager
def weighed(limit: float = math.inf, free: Iterable[Tensor] = ()) -> Iterator[Scale]:
    """Count the bytes of every distinct storage that autograd saves inside, those of `free` (parameters, data) excepted.

    Raises OverBudget inside the block as soon as they exceed `limit`."""
    scale = Scale(limit, free)
    with torch.autograd.graph.saved_tensors_hooks(scale.pack, lambda tensor: tensor):
        yield scale


class Store(AbstractContextManager):
    """Keeps trees of tensors where they are (None), in host memory ("cpu") or in a temporary folder ("disk", safetensors).

    The folder goes when the block ends, exceptions included."""

    def __init__(self, offload: str | None):
        if offload not in OFFLOADS:
            raise ValueError(f'offload={offload!r}: it must be None, "cpu" or "disk"; pass one of them')
        self.offload = offload
        self._folder = tempfile.TemporaryDirectory(prefix="dpgbench-states-") if offload == "disk" else None
        self._count = 0

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, tree: Any) -> Callable[[], Any]:
        """Put a tree away; the returned function brings it back, once."""
        if self.offload is None:
            return lambda: tree
        if self.offload == "cpu":
            devices = tree_map(lambda tensor: tensor.device, tree)
            away = tree_map(lambda tensor: tensor.to("cpu"), tree)
            return lambda: tree_map(lambda tensor, device: tensor.to(device), away, devices)
        return self._to_disk(tree)

    def _to_disk(self, tree: Any) -> Callable[[], Any]:
        from safetensors.torch import load_file, save_file

        leaves, structure = tree_flatten(tree)
        devices = [leaf.device for leaf in leaves]
        path = Path(self._folder.name) / f"{self._count}.safetensors"
        self._count += 1
        # safetensors takes no views into a shared buffer
        whole = (leaf if leaf.untyped_storage().nbytes() == leaf.nbytes else leaf.clone() for leaf in leaves)
        save_file({str(index): leaf.contiguous() for index, leaf in enumerate(whole)}, path)

        def back() -> Any:
            tensors = load_file(path)
            path.unlink()
            return tree_unflatten([tensors[str(index)].to(device) for index, device in enumerate(devices)], structure)

        return back

    def held_bytes(self, tree: Any) -> int:
        """What `put` of this tree leaves on the device."""
        leaves = _tensors(tree)
        stays = self.offload is None or (self.offload == "cpu" and all(leaf.device.type == "cpu" for leaf in leaves))
        return tensor_bytes(tree) if stays else 0
