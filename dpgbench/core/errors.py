"""Exceptions of the harness (bad input by the user; a cell that is busy, lost, interrupted or failed) and "did you mean" suggestions."""

from __future__ import annotations

import errno
from collections.abc import Iterable

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


class UserError(ValueError):
    """Bad input. The message is one line that names the value, the rule and the fix; the CLI prints it and exits with code 2."""


class Busy(UserError):
    """Another process works on the cell; it will leave a result of its own."""


class Lost(RuntimeError):
    """This process was taken for dead and another one owns the cell now; nothing more may be written."""


class Gone(Lost):
    """The cell's folder was deleted or replaced while this process worked on it."""


class Interrupted(RuntimeError):
    """Asked to stop (time limit, preemption, cancellation); what is done so far has been kept."""


class CellError(RuntimeError):
    """A cell cannot go on (a reward that is not finite, say). The message becomes the cell's `error.txt`; other cells go on."""


def for_want_of_memory(error: BaseException) -> bool:
    """Python's, torch's for a device, and torch's for the processor, which is a RuntimeError like any other."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "std::bad_alloc"))
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def for_want_of_storage(error: BaseException) -> bool:
    """What is wrong with the file system: no fault of the cell."""
    return isinstance(error, OSError) and error.errno in STORAGE


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """The tail of an error message: the closest choice, if one is close, and all of them."""
    choices = sorted(choices)
    close = nearest(str(value), choices, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choose from: {', '.join(choices) or '(none)'}"


def nearest(value: str, choices: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The choices at the least edit distance for their length, if they are close; swapping two neighbours is one edit."""
    from rapidfuzz.distance import OSA  # only an error needs it

    likeness = {choice: OSA.normalized_similarity(value.casefold(), choice.casefold()) for choice in choices}
    best = max([cutoff, *likeness.values()])
    return [choice for choice, alike in likeness.items() if alike >= best]
