"""Checkpoints inside a cell: where an interrupted run goes on from, so that its numbers are those of a run that never stopped.

A checkpoint is one file, `checkpoint.<step>.safetensors`: the tensors of whoever trains (weights, optimizer moments, random streams)
and, in the header, as JSON, everything else (meter, scored snapshots, sizes and checksums of the growing files). It is written under
another name, flushed and renamed; the newest two are kept. A run continues from the newest checkpoint whose checksum, cell and code
version match and whose append-only files (metrics.jsonl and the like) begin with the bytes that were there; otherwise the older one is
tried.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpgbench.core.errors import CellError
from dpgbench.core.files import replacing
from dpgbench.core.interrupts import Stop

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
FILE = re.compile(r"checkpoint\.(\d+)\.safetensors")


@dataclass(frozen=True)
class Saved:
    """What a method told `Workbench.checkpoint`, back again."""

    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


def steps_in(folder: Path) -> list[int]:
    """The steps there are checkpoints of, newest first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((int(match[1]) for name in names if (match := FILE.fullmatch(name))), reverse=True)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint.{step:08d}.safetensors"


def remove(folder: Path, *, keep: int = 0) -> None:
    """Remove a folder's checkpoints but the newest `keep`."""
    for step in steps_in(folder)[keep:]:
        path_of(folder, step).unlink(missing_ok=True)


def where_to_go_on(folder: Path) -> str:
    """In words, from headers alone: the step an interrupted cell continues at."""
    damaged = []
    for step in steps_in(folder):
        problem = problem_with(path_of(folder, step))
        if not problem:
            return f"goes on from step {step}" + (f" (checkpoint {damaged[0]} is damaged)" if damaged else "")
        damaged.append(step)
    return "its checkpoints are damaged, starts again" if damaged else "no checkpoint, starts again"


def problem_with(path: Path) -> str:
    """What the header and size of a checkpoint file tell without torch: "" if it is complete."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                return "cut short"
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        json.loads(header["__metadata__"]["dpgbench"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not readable ({type(error).__name__})"
    return "" if size == 8 + length + max(ends, default=0) else "cut short"


@dataclass
class Checkpoints:
    """One cell's checkpoints: written when `seconds` have passed since the last, or when the process was asked to stop.

    A checkpoint that takes long is made less often, so that all of them together take a twentieth of the time; `seconds=0` is every step.
    """

    folder: Path
    identity: dict[str, str]
    """Cell hash and code digest: a checkpoint with another identity is not used."""
    seconds: float = 60.0
    stop: Stop = field(default_factory=lambda: Stop())
    _last: float = field(default_factory=time.monotonic, repr=False)
    _took: float = field(default=0.0, repr=False)

    def due(self) -> bool:
        wait = max(self.seconds, 20 * self._took) if self.seconds else 0.0
        return self.stop.asked is not None or time.monotonic() - self._last >= wait

    def save(self, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Write atomically and drop what is older than the newest two. Cost: the tensors' bytes, once through a checksum and to disk."""
        start = time.monotonic()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = json.dumps({**content, "identity": self.identity, "step": step})
        write_tensors(path_of(self.folder, step), tensors, {"dpgbench": about, "checksum": str(_checksum(tensors, about))})
        remove(self.folder, keep=KEPT)
        self._last = time.monotonic()
        self._took = self._last - start

    def newest(self, begins_with: Callable[[Mapping[str, Sequence[int]]], bool]) -> tuple[Saved, dict[str, Any]] | None:
        """The newest checkpoint that is whole and whose growing files are as it knew them, and its content; None: start again."""
        for step in steps_in(self.folder):
            loaded = self._load(path_of(self.folder, step))
            if loaded is None:
                continue
            tensors, content = loaded
            if begins_with(content["growing"]):
                return Saved(step, tensors, content["numbers"]), content
        return None

    def of(self, step: int) -> tuple[Saved, dict[str, Any]]:
        """The checkpoint of a step that another process of the cell has chosen. Raises CellError where this one cannot read it."""
        loaded = self._load(path_of(self.folder, step))
        if loaded is None:
            raise CellError(f"{path_of(self.folder, step)}: not readable from every process; results must lie on a file system they share")
        return Saved(step, loaded[0], loaded[1]["numbers"]), loaded[1]

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        from safetensors import SafetensorError, safe_open

        if problem_with(path):
            return None
        try:
            with safe_open(path, "pt") as file:
                about, checksum = file.metadata()["dpgbench"], file.metadata().get("checksum")
                content = json.loads(about)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None
        fits = checksum == str(_checksum(tensors, about)) and content["identity"] == self.identity
        return (tensors, content) if fits else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all. Raises the system's error, where safetensors hides it in a text of its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as partial:
            save_file(dict(tensors), partial, metadata=metadata and dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error from None


def _checksum(tensors: Mapping[str, Tensor], about: str) -> int:
    import torch

    total = zlib.crc32(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        if tensor.numel():
            total = zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), total)
    return total
