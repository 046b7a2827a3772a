"""A user's own texts: a file is read here, with an error that names the line, and its content is part of what a cell is.

A `.txt` file has one text per line; a `.jsonl` file has one object per line with the text in the field "text". Blank lines and empty texts
are ignored. Passages for prompts may also come from a `.parquet` file, and may be in a field with another name (`scale.corpus_column`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import unicodedata
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dpgbench.core.errors import UserError

if TYPE_CHECKING:
    import regex
    from pyarrow import DataType

PASSAGES = (".txt", ".jsonl", ".parquet")
# Letters of scripts that put no space between words. Where a word ends only a dictionary tells, so each letter, with its marks, counts as
# one.
UNSPACED = r"[\w&&[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}]--\p{M}]"


class Line(NamedTuple):
    """A text and the number of its line, for errors that come later."""

    number: int
    text: str


def digest(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex; read once, as long as nobody writes to it. Raises UserError if it cannot be read."""
    file = _regular(path)
    about = file.stat()
    try:
        return _digest(file, (about.st_ino, about.st_size, about.st_mtime_ns))
    except OSError as error:
        raise _unreadable(path, error.strerror) from None


def is_passages(corpus: str) -> bool:
    """Whether a scale's corpus is a file of the user's."""
    return Path(corpus).suffix.lower() in PASSAGES


def read_passages(path: str | Path, column: str = "text", sha256: str | None = None) -> list[str]:
    """The texts of a `.txt`, `.jsonl` or `.parquet` file under `column`, stripped, none of them empty, as `read` does it."""
    if Path(path).suffix.lower() != ".parquet":
        return [line.text for line in read(path, sha256, column)]
    import io

    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    content = _checked_content(path, sha256)
    try:
        file = ParquetFile(io.BytesIO(content))
        names = file.schema_arrow.names
        found = file.read([column]).column(0).to_pylist() if column in names else None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a text under {column!r} is not UTF-8 ({error.reason}); write it anew as UTF-8") from None
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it anew") from None
    if found is None:
        raise UserError(f"scale.corpus_column={column}: {path} has {', '.join(names)}; write one of them")
    bad = next((row for row, text in enumerate(found) if not isinstance(text, str | None)), None)
    if bad is not None:
        raise no_string(path, bad, column, (field.name for field in file.schema_arrow if holds_strings(field.type)))
    return [_sound(text.strip(), f"{path}, row {row}") for row, text in enumerate(found, start=1) if text and text.strip()]


def holds_strings(kind: DataType) -> bool:
    """Whether a column of that type of Arrow is one of texts."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def no_string(place: str | Path, row: int, column: str, columns: Iterable[str]) -> UserError:
    """A cell of a table that is no text; `columns` are those that hold texts."""
    fix = f"give a column of texts with corpus_column=, one of: {', '.join(columns) or '(none)'}"
    return UserError(f"{place}, row {row + 1}: no string under {column!r}; {fix}")


def read(path: str | Path, sha256: str | None = None, column: str = "text") -> list[Line]:
    """The texts of a file, stripped, at least one. Raises UserError for a file that is not what it should be.

    With `sha256` the content must have that digest: a cell that is run again, or late, is run on the texts it was made for.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise UserError(f'{path}: held-out texts are a .txt (one a line) or a .jsonl (one {{"text": ...}} a line), not {suffix or "this"}')
    content = _checked_content(path, sha256)
    lines = []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        text = _decoded(raw, f"{path}, line {number}")
        if suffix == ".jsonl" and text:
            text = _field(text, f"{path}, line {number}", column)
        if text:
            lines.append(Line(number, text))
    if not lines:
        raise UserError(f"{path}: there is no text in it; write one a line")
    return lines


def flaw_of(text: str) -> str | None:
    """Why a string is no text that can be stored, or None."""
    if "\0" in text:
        return "a NUL character"  # UTF-16 read as UTF-8, say
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half a surrogate pair, or a byte that is not UTF-8,"
    return None


def words_of(text: str) -> list[str]:
    """A text's words in order, without punctuation; an apostrophe inside belongs to one. Composed (NFC), as written otherwise."""
    return _patterns()[0].findall(unicodedata.normalize("NFC", text))


def count_words(text: str) -> int:
    """What stands between spaces, punctuation standing alone included, as people count; of scripts without spaces `words_of`."""
    _, unspaced = _patterns()
    if text.isascii() or not unspaced.search(text):
        return len(text.split())
    return sum(len(words_of(part)) if unspaced.search(part) else 1 for part in text.split())


@cache
def _patterns() -> tuple[regex.Pattern[str], regex.Pattern[str]]:
    """A word, and a letter of a script without spaces."""
    import regex

    letters = rf"[[\w\p{{M}}\p{{N}}\u200c\u200d]--{UNSPACED}]+"  # the last two join letters inside a word
    return tuple(regex.compile(f"(?V1){pattern}") for pattern in (rf"{UNSPACED}\p{{M}}*|{letters}(?:['’]{letters})*", UNSPACED))


def squeezed(text: str) -> str:
    """Composed (NFC) and without any whitespace: what two strings are compared by, however each was typed or tokenised."""
    return "".join(unicodedata.normalize("NFC", text).split())


def split(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Two halves, dev and test, that share no text; the same whatever the order of the texts, each in a mixed but fixed order."""
    ordered = sorted(set(texts), key=lambda text: (zlib.crc32(text.encode()), text))
    return ordered[0::2], ordered[1::2]


@cache
def _digest(file: Path, state: tuple[int, ...]) -> str:
    """Of a file in that state."""
    total = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 24):
            total.update(part)
    return total.hexdigest()


def _regular(path: str | Path) -> Path:
    """The file itself. Raises UserError for what is none: a pipe would never end, or be empty when it is read again."""
    try:
        file = Path(path).expanduser()
        mode = file.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL or half a surrogate pair in the path
        raise _unreadable(path, getattr(error, "strerror", error)) from None
    if not stat.S_ISREG(mode):
        raise _unreadable(path, os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "Not a regular file")
    return file


def _unreadable(path: str | Path, reason: object) -> UserError:
    return UserError(f"{path}: cannot be read ({reason}); give the path of a .txt or .jsonl file")


def _content(path: str | Path) -> bytes:
    file = _regular(path)
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(path, error.strerror) from None


def _checked_content(path: str | Path, sha256: str | None) -> bytes:
    """A file's bytes, whose digest must be `sha256` if that is given."""
    content = _content(path)
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise UserError(
            f"{path}: its content has SHA-256 {found[:12]}..., and this cell was made for {sha256[:12]}...; bring the old file back, or "
            f"start a new cell"
        )
    return content


def _decoded(raw: bytes, where: str) -> str:
    try:
        return _sound(raw.decode("utf-8").strip(), where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8") from None


def _sound(text: str, where: str) -> str:
    if (flaw := flaw_of(text)) is not None:
        raise UserError(f"{where}: {flaw} is in the text; save the file as UTF-8")
    return text


def _field(line: str, where: str, column: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f'{where}: not JSON ({error.msg} at column {error.colno}); write {{"{column}": "..."}}') from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        told = "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
        raise UserError(f'{where}: cannot be read as JSON ({told}); write {{"{column}": "..."}}') from None
    if not isinstance(value, dict) or not isinstance(value.get(column), str):
        raise UserError(f'{where}: no string under "{column}"; write {{"{column}": "..."}}')
    return _sound(value[column].strip(), where)
