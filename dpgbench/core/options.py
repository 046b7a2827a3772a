"""Settings as sections with dotted keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


class Options(Mapping):
    """A read-only view of one section of the configuration; `options.lr` and `options["lr"]` are the same."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"no option {key!r}; there are: {', '.join(self._values)}") from None

    def __getitem__(self, key: str) -> Any:
        value = self.__dict__["_values"][key]
        return Options(value) if isinstance(value, dict) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Options({self._values})"

    def plain(self) -> dict[str, Any]:
        """The same as nested plain dicts."""
        return json.loads(json.dumps(self._values))


def leaves_of(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key: {"policy": {"lr": 1e-3}} -> {"policy.lr": 1e-3}."""
    leaves: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            leaves |= leaves_of(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
