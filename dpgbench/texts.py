"""A user's own texts: a file is read here, with an error that names the line, and its content is part of what a cell is.

A `.txt` file holds one text a line, a `.jsonl` file one object a line with its text under "text". Blank lines and texts are ignored.
Passages for prompts may also be a `.parquet` file, and be under another name.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dpgbench.errors import UserError

PASSAGES = (".txt", ".jsonl", ".parquet")


class Line(NamedTuple):
    """A text and the number of its line, for errors that come later."""

    number: int
    text: str


def digest(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex. Raises UserError if it cannot be read."""
    return hashlib.sha256(_content(path)).hexdigest()


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
    except ArrowException as error:
        raise UserError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it anew") from None
    if found is None:
        raise UserError(f"scale.corpus_column={column}: {path} has {', '.join(names)}; write one of them")
    bad = next((row for row, text in enumerate(found) if not isinstance(text, str | None)), None)
    if bad is not None:
        raise UserError(f"{path}, row {bad + 1}: no string under {column!r}; give the name of a column of texts with corpus_column=")
    return [text.strip() for text in found if text and text.strip()]


def read(path: str | Path, sha256: str | None = None, column: str = "text") -> list[Line]:
    """The texts of a file, stripped, at least one. Raises UserError for a file that is not what it should be.

    With `sha256` the content must have that digest: a cell that is run again, or late, is run on the texts it was made for.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise UserError(f'{path}: held-out texts are a .txt (one a line) or a .jsonl (one {{"text": ...}} a line), not {suffix or "this"}')
    content = _checked_content(path, sha256)
    lines = []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        text = _decoded(raw, f"{path}, line {number}")
        if suffix == ".jsonl" and text:
            text = _field(text, f"{path}, line {number}", column)
        if text:
            lines.append(Line(number, text))
    if not lines:
        raise UserError(f"{path}: there is no text in it; write one a line")
    return lines


def split(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Two halves, dev and test, that share no text; the same whatever the order of the texts, each in a mixed but fixed order."""
    ordered = sorted(set(texts), key=lambda text: (zlib.crc32(text.encode()), text))
    return ordered[0::2], ordered[1::2]


def _content(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a .txt or .jsonl file") from None


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
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8") from None


def _field(line: str, where: str, column: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f'{where}: not JSON ({error.msg} at column {error.colno}); write {{"{column}": "..."}}') from None
    if not isinstance(value, dict) or not isinstance(value.get(column), str):
        raise UserError(f'{where}: no string under "{column}"; write {{"{column}": "..."}}')
    return value[column].strip()
