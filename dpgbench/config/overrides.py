"""`key=value[,value...]` as it was typed: what Hydra's grammar reads in each value, and the value's own text beside it.

Hydra's grammar reads 1.10 as a number and cannot read a sentence with an accent. Whether an option is a number or a text depends on its
default value, so both readings are kept until the default is known (values.py).
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpgbench.core.errors import UserError

MANY = 100_000  # values of one key

_QUOTED = re.compile(r"""\s*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?=\s*(?:[,:\])}]|$))""", re.DOTALL)
_COMMA = re.compile(r"\s*,\s*")
_PLAIN = re.compile(
    r"(?!(?:null|true|false|inf|nan)$)[a-z_][a-z_0-9]*", re.IGNORECASE | re.ASCII
)  # a name to the grammar, and nothing else
_WHOLE = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")  # as in Hydra's grammar


class Word(str):
    """A value as it was typed, without the quotes of the grammar.

    `value` is what the grammar reads, or the text itself where it reads nothing. `gap` is what stood between this value and the next one
    if that could be part of a sentence: a comma with white space after it, and no quotes on either side.
    """

    value: Any
    gap: str

    def __new__(cls, text: str, value: Any, gap: str = "") -> Word:
        word = super().__new__(cls, text)
        word.value, word.gap = value, gap
        return word


def parse(arguments: Iterable[str]) -> dict[str, list[Word]]:
    """`["seed=0,1", "task=all"]` -> `{"seed": ["0", "1"], "task": ["all"]}`, values as Words."""
    words: dict[str, list[Word]] = {}
    for argument in arguments:
        found = re.match(r"([A-Za-z_][\w./-]*)=", argument)
        if not found:
            raise UserError(f"{argument!r} is not understood; arguments are key=value without spaces, such as seed=0 or task=language")
        key, text = re.sub(r"^model\.(?=generator|target)", "scale.", found[1]), argument[found.end() :]
        if key in words:
            raise UserError(f"{key} is given twice; give several values as {key}=a,b")
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"{argument}: these bytes are not UTF-8 text; set the terminal's encoding to UTF-8") from None
        if "${" in text:
            raise UserError(f"{argument}: ${{...}} is not filled in here; write the value itself, or let the shell do it, in double quotes")
        words[key] = _values(key, text)
    return words


def as_texts(words: Sequence[Word]) -> list[Word]:
    """The values of an option that is text: a comma with white space after it belongs to a sentence and separates nothing."""
    found, begun = [], ""
    for word in words:
        if word.gap:
            begun += word + word.gap
        else:
            found.append(Word(begun + word, begun + word) if begun else word)
            begun = ""
    return found


def one(words: Mapping[str, Sequence[Word]], key: str, default: str | None = None) -> str | None:
    """The text of a key that has one value. Raises UserError for several."""
    if key not in words:
        return default
    values = as_texts(words[key])
    if len(values) > 1:
        raise UserError(
            f"{key}={','.join(values)}: one value is wanted and this is {len(values)}; write {for_shell(key, ','.join(values))}"
        )
    return str(values[0])


def for_shell(key: str, text: str) -> str:
    """An argument that gives the text as one value, quoted for the grammar where that is needed, and for a shell."""
    word = quoted(key, text)
    plain = shlex.quote(word)
    return plain if plain == word or set('"$`\\!') & set(word) else f'"{word}"'


def quoted(key: str, text: str) -> str:
    """The same as the shell hands it on."""
    try:
        plain = [str(word) for word in as_texts(parse([f"{key}={text}"])[key])] == [text]
    except UserError:
        plain = False
    if plain:
        return f"{key}={text}"
    from hydra.core.override_parser.types import Quote, QuotedString

    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def _values(key: str, text: str) -> list[Word]:
    parts = _split(text)
    words: list[Word] = []
    for (part, gap), (following, _) in itertools.zip_longest(parts, parts[1:], fillvalue=("", "")):
        if not part:
            fix = f"write {key}=a,b" if len(parts) > 1 else f"leave {key}= out, or write {key}=\"''\" for an empty text"
            raise UserError(f"{key}={text}: a value is missing; {fix}")
        kept = gap if gap[-1:].isspace() and not (_is_quoted(part) or _is_quoted(following)) else ""
        words += [Word(found, value, kept) for found, value in _read(part)]
    if len(words) > MANY:
        raise UserError(f"{key}={text}: more than {MANY} values; name fewer")
    return words


def _split(text: str, brackets: bool = True) -> list[tuple[str, str]]:
    """The values between commas, and the comma after each with its white space; commas in quotes and brackets are the values' own.

    Quotes open where a value does: an apostrophe is none. Brackets that do not match are characters like others.
    """
    parts, start, at, depth, opens = [], 0, 0, 0, True
    while at < len(text):
        comma = _COMMA.match(text, at)
        if opens and (quoted := _QUOTED.match(text, at)):
            at, opens = quoted.end(), False
            continue
        if comma and depth == 0:
            parts.append((text[start:at].strip(), comma[0]))
            start = at = comma.end()
            opens = True
            continue
        if text[at] == "\\":
            at += 1
        elif brackets and text[at] in "[({":
            depth += 1
        elif brackets and text[at] in "])}":
            depth -= 1
            if depth < 0:
                return _split(text, brackets=False)
        opens = depth > 0 and at < len(text) and text[at] in "[({,:"
        at += 1
    return _split(text, brackets=False) if depth else [*parts, (text[start:].strip(), "")]


def _is_quoted(part: str) -> bool:
    found = _QUOTED.match(part)
    return found is not None and found.end() == len(part)


@functools.cache
def _read(part: str) -> list[tuple[str, Any]]:
    """A value's text and what the grammar reads in it: one pair, or one for each value of a range or a choice.

    Names and whole numbers are read without Hydra, whose import takes longer than most commands.
    """
    if _PLAIN.fullmatch(part):
        return [(part, part)]
    if _WHOLE.fullmatch(part):
        return [(part, int(part))]
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"value={part}")
        if override.is_sweep_override():
            values = [getattr(value, "text", value) for value in itertools.islice(override.sweep_iterator(), MANY + 1)]
            return [(str(value), value) for value in values]
        value = override.value()
    except (HydraException, ValueError, RecursionError):
        text = _ESCAPED.sub(r"\1", part)
        return [(text, text)]
    return [(value if isinstance(value, str) else part, value)]
