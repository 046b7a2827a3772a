"""What a suite fixes before its first result: about which methods it asks, and from where on a difference matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpgbench.core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Protocol:
    """`references` are the labels of the methods that are compared with all others in the primary tests (docs/protocol.md).

    `meaningful` is the least difference that matters, as a share of the way from base to oracle. Empty where a suite fixed nothing: then
    no primary test is shown.
    """

    references: tuple[str, ...] = ()
    meaningful: float | None = None


NOTHING_FIXED = Protocol()


def read_protocol(stored: Mapping[str, Any] | None, where: str) -> Protocol:
    """From the `protocol` section of a suite's YAML; `where` names the file in errors. UserError for what it cannot be."""
    if stored is None:
        return NOTHING_FIXED
    if not isinstance(stored, Mapping):
        raise UserError(f"{where}: protocol is {stored!r}, but it has the keys references and meaningful; write references: [dpg]")
    for key in stored:
        if key not in ("references", "meaningful"):
            raise UserError(f"{where}: protocol.{key}: no such key; {did_you_mean(str(key), ('references', 'meaningful'))}")
    references, meaningful = stored.get("references", []), stored.get("meaningful")
    if not isinstance(references, list) or not references or not all(isinstance(label, str) for label in references):
        raise UserError(f"{where}: protocol.references is {references!r}, but it is a list of method labels; write references: [dpg]")
    if meaningful is not None and (isinstance(meaningful, bool) or not isinstance(meaningful, int | float) or not meaningful > 0):
        raise UserError(f"{where}: protocol.meaningful is {meaningful!r}, but it is a positive number; write meaningful: 0.05")
    return Protocol(tuple(dict.fromkeys(references)), None if meaningful is None else float(meaningful))
