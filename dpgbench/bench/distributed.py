"""The processes that work on one cell together, a GPU each: those that torchrun started, or this one alone.

The first of them (rank 0) owns the cell: its lock and folder, checkpoints, scoring and everything that is printed. The others take the
same steps on the same numbers, compute their shares of them, and write nothing. If one process fails, all stop: the failing process writes
this to torchrun's store, which a thread in every process polls, because the others may be waiting in a collective operation that will never
finish.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from dpgbench.core.errors import Interrupted, UserError

LOOK_SECONDS = 0.2
GRACE_SECONDS = 5.0  # for a process to come to its own end: what fails in one often fails in all
PATIENCE = timedelta(days=1)  # of an exchange: the first process scores while the others wait, which is no failure
FAILED, HEARD = "dpgbench.failed", "dpgbench.heard"


def rank() -> int:
    """This process's place among torchrun's, known without torch; 0 outside torchrun."""
    return int(os.environ.get("RANK", 0)) if size() > 1 else 0


def size() -> int:
    """How many processes torchrun started; 1 outside it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= set(os.environ) else 1


class SingleProcess:
    """One process: everything is its own."""

    rank, size, first = 0, 1, True

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in every process."""
        return value

    def gathered(self, values: Sequence[Any]) -> list[Any]:
        """Everybody's values in one list, those of the first process first."""
        return list(values)

    @contextmanager
    def shared_fate(self, on_failure: Callable[[str], None]) -> Iterator[None]:
        """Inside, a process that fails (`fail`) ends the others; `on_failure` is told why, in the first process alone."""
        yield

    def fail(self, reason: str) -> None:
        """Tell the others that this process cannot go on."""

    def why(self, error: Exception) -> str | None:
        """What is behind an error, if it is another process's failure."""

    def close(self) -> None:
        """After the last cell, if nothing failed."""


class Torchrun(SingleProcess):
    """torchrun's processes. Exchanges of objects go through gloo, tensors on GPUs through NCCL."""

    def __init__(self) -> None:
        """Waits until all processes are here. Raises UserError if there are more of them than GPUs."""
        import torch
        import torch.distributed as distributed
        from torch.distributed.rendezvous import rendezvous

        self.last_words: Callable[[], None] = lambda: None
        """Called in the first process, last of all, when another one's failure ends it."""
        local, backend = int(os.environ["LOCAL_RANK"]), "gloo"
        if torch.cuda.is_available():
            there = torch.cuda.device_count()
            if local >= there:
                raise UserError(f"torchrun: a process for each GPU, and there are {there} here; write --nproc-per-node={there}")
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        self._distributed = distributed
        self._store, self.rank, self.size = next(rendezvous("env://", timeout=PATIENCE))
        self.first = self.rank == 0
        distributed.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        self._over = threading.Event()

    def broadcast(self, value: Any) -> Any:
        box = [value]
        self._distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, values: Sequence[Any]) -> list[Any]:
        shares: list[Any] = [None] * self.size
        self._distributed.all_gather_object(shares, list(values))
        return [value for share in shares for value in share]

    @contextmanager
    def shared_fate(self, on_failure: Callable[[str], None]) -> Iterator[None]:
        self._over.clear()
        watcher = threading.Thread(target=self._watch, args=(self._store.clone(), on_failure), name="other processes", daemon=True)
        watcher.start()
        try:
            yield
        except Interrupted:  # agreed upon by all
            raise
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._over.set()
            watcher.join(2 * GRACE_SECONDS)  # a thread that is asking the store when Python ends would abort the process

    def fail(self, reason: str) -> None:
        """The first process goes on to its own end; any other waits until the first has heard, so that its silence is not the news."""
        self._over.set()
        mine = f"process {self.rank} of {self.size}: {reason}".encode()
        news = bytes(self._store.compare_set(FAILED, "", mine)) == mine
        until = time.monotonic() + 2 * GRACE_SECONDS
        while news and not self.first and time.monotonic() < until and not self._store.check([HEARD]):
            time.sleep(LOOK_SECONDS)

    def why(self, error: Exception) -> str | None:
        """Of a failed exchange: what the process that broke it said, or that it died."""
        broken = isinstance(error, self._distributed.DistError) or any(
            word in str(error).lower() for word in ("gloo", "nccl", "connection closed", "connection reset")
        )
        if not broken:
            return None
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            if self._store.check([FAILED]):
                return self._store.get(FAILED).decode()
            time.sleep(LOOK_SECONDS)
        return f"one of the {self.size} processes died without a word: perhaps out of memory; torchrun's own lines say which"

    def close(self) -> None:
        self._distributed.destroy_process_group()

    def _watch(self, store: Any, on_failure: Callable[[str], None]) -> None:
        try:
            while not store.check([FAILED]):
                if self._over.wait(LOOK_SECONDS):
                    return
        except RuntimeError:  # the store is gone, and torchrun with it
            return
        if self._over.wait(GRACE_SECONDS):
            return
        if self.first:
            on_failure(store.get(FAILED).decode())
            store.set(HEARD, "yes")
            self.last_words()
        os._exit(1)


SINGLE_PROCESS = SingleProcess()


def start() -> SingleProcess:
    """The group this process belongs to; under torchrun, waits for the others."""
    return Torchrun() if size() > 1 else SINGLE_PROCESS
