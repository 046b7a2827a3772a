"""Find the option that a word of the command line sets, and convert the value to the type of that option's default."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpgbench.config.overrides import Word, for_shell
from dpgbench.core.errors import UserError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

GROUPS = ("task", "method", "scale", "launcher")
PLACES = ("suite", "name", "results", "plugins", "retry")  # words that set no option
FREE = ("launcher.resources.", "launcher.sbatch.")  # any method, scale or option of sbatch may be named there
TEXTS = frozenset(  # options that are words although their default is null
    ["task.file", *(f"scale.{option}" for option in ("corpus_subset", "corpus_column", "corpus_revision", "instruction", "wording",
     "generator_revision", "target_revision")), *(f"launcher.{option}" for option in ("partition", "account", "qos", "constraint"))]
)  # fmt: skip


def resolved_key(key: str, leaves: Mapping[str, Any]) -> str | None:
    """The dotted key that a possibly bare key stands for, None if this configuration has none."""
    if key in leaves or f"{key}.".startswith(FREE):
        return key
    matches = [full for full in leaves if full.endswith(f".{key}")]
    if "." in key or not matches:
        return None
    if len(matches) > 1:
        raise UserError(f"{key}: could mean {' or '.join(matches)}; write the one you mean in full")
    return matches[0]


def closest(key: str, leaves: Iterable[str]) -> str:
    """The keys that come close to `key`, or where to find them all: whole ones, or the last names of dotted ones."""
    whole, last = [*GROUPS, *PLACES, *sorted(leaves)], key.rpartition(".")[2]
    lasts = {name: name.rpartition(".")[2] for name in whole}
    same = [name for name in whole if lasts[name] == last]
    close = (
        nearest(key, same, cutoff=0.0)
        or nearest(key, whole)
        or [name for name in whole if lasts[name] in nearest(last, set(lasts.values()))]
    )
    return f"did you mean {' or '.join(close[:3])}?" if close else "configs/ has them all, with a comment each"


def one_value_form(words: Mapping[str, Sequence[Word]]) -> str:
    """How to write a sentence with commas, where that is what several values may have been meant to be."""
    key = next((key for key, values in words.items() if any(" " in word for word in values) and len(values) > 1), None)
    return f", or {for_shell(key, ','.join(words[key]))} for one value with a comma" if key else ""


def several_values_form(words: Mapping[str, Sequence[Word]], error: str) -> str:
    """How to separate values, where an error is about what was read as a sentence with a comma."""
    key = next(
        (key for key, values in words.items() if any(word.gap for word in values) and "".join(w + w.gap for w in values) in error), None
    )
    return f"; a comma and a space are part of a text: separate values as in {key}={','.join(words[key])}" if key else ""


def default_of(config: DictConfig, full: str, written: Any) -> Any:
    """What a setting is if nobody says otherwise: as written, or what the interpolation that is written comes to."""
    from omegaconf import OmegaConf

    return OmegaConf.select(config, full) if isinstance(written, str) and "${" in written else written


def checked_value(key: str, full: str, word: Word, default: Any) -> Any:
    """A value of an option that is no text, of the default's kind."""
    from omegaconf import OmegaConf

    value = word.value
    if isinstance(default, float) and type(value) is int:
        value = float(str(value))
    if type(default) is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e3 is a whole number too
    if full.startswith("launcher.sbatch.") and type(value) in (int, float):
        return str(word)  # as sbatch is to get it
    if OmegaConf.is_config(default):
        raise UserError(f"{key}={word}: a whole section; set its options one by one, such as {key}.{next(iter(default), 'option')}=...")
    if isinstance(default, list) and isinstance(value, list):
        return _checked_list(key, full, word, default)
    if default is not None and type(value) is not type(default):
        example = [str(word)] if default == [] else default
        raise UserError(f"{key}={word}: expected {_kind(default)}, such as {full}={_shown(example)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={word}: a setting must be finite, such as {full}={_shown(default)}")
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{key}={word}: a whole number has 64 bits at most, such as {full}={_shown(default)}")
    return value


def _checked_list(key: str, full: str, word: Word, default: list[Any]) -> list[Any]:
    """A list whose parts are of the kinds of the default's, where that has any."""
    kinds = set(map(type, default))
    for part in word.value:
        if kinds and type(part) not in kinds | ({int} if float in kinds else set()):
            raise UserError(f"{key}={word}: {_shown(part)} is of another kind than what is in {full}={_shown(default)}")
        if isinstance(part, float) and not math.isfinite(part):
            raise UserError(f"{key}={word}: a setting must be finite, such as {full}={_shown(default)}")
    return word.value


def checked_text(key: str, full: str, word: Word, default: str | None) -> str:
    if word == "???":
        raise UserError(f"{key}=???: to OmegaConf that is a value still missing; write another text, such as {full}={_shown(default)}")
    return str(word)


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _shown(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return {True: "true", False: "false", None: "null"}.get(value) if value is None or isinstance(value, bool) else str(value)
