"""Passages of the user's choice as prompts: a file of theirs, or a data set of the model hub.

The three splits share no text, whatever the order of the rows and however often one is repeated.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import TYPE_CHECKING

from dpgbench.core.errors import UserError
from dpgbench.core.plugin_types import Prompt
from dpgbench.core.settings import Scale
from dpgbench.worlds import text_files
from dpgbench.worlds.corpora import SPLITS, Topics, bucket_of
from dpgbench.worlds.prompts import Wording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset

FEWEST = 20  # different texts of a file, of which dev and test have one each
MOST_TRIES = 10_000  # rows that are looked at for a text of one split, which has one in twenty or more


class FileTexts(Topics):
    """A `.txt` (one a line), `.jsonl` or `.parquet` (a column) file: one text in twenty is dev, one test, the others are train."""

    def __init__(self, scale: Scale, wording: Wording):
        path, column = scale.corpus, scale.get("corpus_column") or "text"
        found = text_files.read_passages(path, column, scale.get("corpus_sha256"))
        ordered = sorted(set(found), key=lambda text: (zlib.crc32(text.encode()), text))
        if len(ordered) < FEWEST:
            raise UserError(f"scale.corpus={path}: {len(ordered)} different texts, and three splits need {FEWEST}; write more")
        dev, test = ordered[0::20], ordered[10::20]
        held_out = {*dev, *test}
        self._passages = {"train": [text for text in ordered if text not in held_out], "dev": dev, "test": test}
        self.wording = wording


def no_limit(said: str, tokens: int) -> UserError:
    return UserError(f"{said}: a data set of the hub is not looked through for prompts that are too long; write max_prompt_tokens={tokens}")


class HubTexts(Topics):
    """A data set of the model hub, downloaded once and read from disk row by row: it may be larger than memory.

    A text's split is a matter of its content; rows are drawn until one of the wanted split comes.
    """

    def __init__(self, scale: Scale, wording: Wording):
        self.wording, self._said = wording, f"scale.corpus={scale.corpus}"
        self._rows = self._load(scale)
        self._column = scale.get("corpus_column") or "text"
        if self._column not in self._rows.column_names:
            raise UserError(
                f"scale.corpus_column={self._column}: {scale.corpus} has {', '.join(self._rows.column_names)}; write one of them"
            )
        if not text_files.holds_strings(self._rows.data.schema.field(self._column).type):
            raise self._no_string(0)
        files = " ".join(self._rows.info.download_checksums or {})
        commit = re.search(r"@([0-9a-f]{40})/", files)
        self.revision: str | None = commit[1] if commit else scale.get("corpus_revision")
        """The commit of the hub's repository, where the library tells."""

    def prompts(self, split: str, count: int, rng: random.Random) -> list[Prompt]:
        return [self.wording.prompt(self._draw(split, rng)) for _ in range(count)]

    def longest(self, tokens: int) -> Iterator[Prompt]:
        """Raises UserError: a limit must say how long they may be."""
        raise no_limit(self._said, tokens)

    def _draw(self, split: str, rng: random.Random) -> str:
        for _ in range(MOST_TRIES):
            text = self._text(rng.randrange(len(self._rows)))
            if text and bucket_of(text) in self._buckets(split):
                return text
        raise UserError(f"{self._said}: {MOST_TRIES} rows without a text of the {split} split; it has too few different texts")

    def _of(self, split: str) -> Iterator[str]:
        found = (self._text(row) for row in range(len(self._rows)))
        return (text for text in found if text and bucket_of(text) in self._buckets(split))

    def _held_out_english(self, split: str, count: int) -> list[str]:
        found: dict[str, None] = {}
        for text in self._of(split):
            found[text] = None
            if len(found) == count:
                break
        return list(found)

    def _text(self, row: int) -> str:
        text = self._rows[row][self._column]
        if not isinstance(text, str | None):
            raise self._no_string(row)
        return (text or "").strip()

    def _no_string(self, row: int) -> UserError:
        columns = (field.name for field in self._rows.data.schema if text_files.holds_strings(field.type))
        return text_files.no_string(self._said, row, self._column, columns)

    def _buckets(self, split: str) -> range:
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: not a split of the corpus; one of {', '.join(SPLITS)}")
        return SPLITS[split]

    def _load(self, scale: Scale) -> Dataset:
        import datasets
        from huggingface_hub.errors import HfHubHTTPError

        named = {"path": scale.corpus, "name": scale.get("corpus_subset"), "revision": scale.get("corpus_revision"), "split": "train"}
        try:
            return datasets.load_dataset(**named)
        except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
            reason = str(error).strip().splitlines()[0].split(". ")[0]
            fix = "check name, corpus_subset and corpus_revision, go online once, or give a file of your own"
            raise UserError(f"{self._said}: cannot be loaded ({reason}); {fix}") from None
