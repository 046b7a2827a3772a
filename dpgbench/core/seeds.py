"""Randomness with names: every draw in a cell takes a seed derived from the cell's seed and what the draw is for.

So the same cell gives the same numbers in any order, process or resume, and methods that share a seed share their prompts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for one purpose, such as `derive(0, "rollouts", step)`. Independent streams for different names."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, *names: object) -> random.Random:
    """A named generator of the standard library, for drawing prompts."""
    return random.Random(derive(seed, *names))


@contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Inside, torch's default generators start from `seed`; outside they are as they were.

    For code that only knows the default generator, such as `transformers`' sampling.
    """
    import torch

    # One GPU a process: forking the generators of a node's other GPUs would take memory on each of them.
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield
