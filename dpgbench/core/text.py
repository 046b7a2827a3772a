"""Text of others, a model's above all, where it is shown: as it is, but for characters that would act instead of being read."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # reorder what is read beside them (bidi controls)


def visible(text: str, keep: str = "") -> str:
    """`text` with control characters, lone surrogates, line separators and bidi controls as escapes; those in `keep` stay as they are."""
    return text if text.isprintable() else "".join(char if char in keep else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    acts = unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in TURNS
    return char.encode("unicode_escape", "surrogatepass").decode() if acts else char


def json_text(value: Any) -> str:
    """JSON for people and machines: what `visible` would show by an escape is one of JSON's, so that it is the same text to whoever parses.

    Raises ValueError for a number that JSON does not have.
    """
    written = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"[^\n -~]", lambda found: found[0] if _escaped(found[0]) == found[0] else f"\\u{ord(found[0]):04x}", written)
