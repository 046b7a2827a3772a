"""YAML and JSON that somebody else may have written: read as data, or refused in one line.

No tag makes an object, no interpolation reads the environment, no alias makes a large content of a small file, and whatever a parser raises
for a strange text is the same kind of error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpgbench.core.errors import UserError

MOST_VALUES, DEEPEST = 200_000, 60
LARGEST = 2**26  # bytes of a text that is parsed at once
_FILLED_IN = re.compile(r"\$\{([^{}]*)\}?")
_OF_THE_CONFIGURATION = re.compile(r"\.*\w[\w.-]*", re.ASCII)


class Unreadable(UserError):
    """The message is the reason alone, for whoever knows what the text was for; on its own it is one line as well."""


def text_of(path: Path) -> str:
    """A text file's content. Raises Unreadable for what is none: a folder, a pipe that would never end, bytes that are not UTF-8."""
    try:
        if not path.is_file():
            raise Unreadable("no regular file" if path.exists() else "there is no such file")
        if path.stat().st_size > LARGEST:
            raise Unreadable(f"more than {LARGEST // 2**20} MiB")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Unreadable("not UTF-8 text") from None
    except ValueError:  # of a NUL in the path
        raise Unreadable("no path") from None
    except OSError as error:
        raise Unreadable(error.strerror or "it cannot be opened") from None


def yaml_of(text: str) -> Any:
    """A YAML text's content, read by libyaml, ten times as fast, where PyYAML was built with it. Raises Unreadable."""
    import yaml

    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, kind):  # without recursion: libyaml's binding ends the process over brackets that are too deep
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise Unreadable(f"more than {DEEPEST} levels of brackets or indentation")
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except UserError:
        raise
    except Exception as error:  # constructors of dates, sets and numbers raise what they like
        raise Unreadable(_said("not YAML", error)) from None


def settings_of(text: str) -> Any:
    """YAML as OmegaConf reads settings (1e-3 is a number), interpolations as they are written. Raises Unreadable."""
    import io

    from omegaconf import OmegaConf

    yaml_of(text)  # its size, before OmegaConf writes every alias out
    try:
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except Exception as error:  # as above
        raise Unreadable(_said("not YAML", error)) from None
    check_settings(content)
    return content


def check_settings(content: Any) -> None:
    """Raises Unreadable for settings that are instructions: an interpolation that calls something, keys that Hydra acts on."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str) and (re.fullmatch(r"_\w+_", key) or "${" in key):
                raise Unreadable(f"{key}: settings are values, and this is an instruction; leave it out")
            check_settings(value)
    elif isinstance(content, list):
        for value in content:
            check_settings(value)
    elif isinstance(content, str) and "${" in content:
        for inside in _FILLED_IN.findall(content):
            if not _OF_THE_CONFIGURATION.fullmatch(inside):
                raise Unreadable(f"{content}: only other settings are filled in, as in ${{policy.lr}}; write the value itself")


def json_of(text: str | bytes) -> Any:
    """A JSON text's content. Raises Unreadable, for brackets without end and numbers without end too."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the first is also of an integer of more than 4300 digits, and of bytes that are not UTF-8
        raise Unreadable("not valid JSON") from None


def _said(what: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{what}: {lines[0] if lines else type(error).__name__}"


def _count(node: Any, known: dict[int, int], depth: int) -> int:
    """How many values there are with every alias written out. Raises Unreadable for too many, or too deep ones, as of itself."""
    if depth > DEEPEST:
        raise Unreadable(f"more than {DEEPEST} levels of brackets or indentation")
    if id(node) not in known:
        parts = node.value if isinstance(node.value, list) else []
        inner = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in inner)
        if known[id(node)] > MOST_VALUES:
            raise Unreadable(f"more than {MOST_VALUES} values")
    return known[id(node)]
