"""A user's own held-out files: what is read, what is refused and in which words, and that their content is part of the cell."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import unicodedata

import pytest
from conftest import SMALL

from dpgbench import config
from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry
from dpgbench.worlds import models, text_files
from dpgbench.worlds.world import World, corpus

SENTENCES = [f"der König sieht {number} Häuser" for number in "abcdefghijkl"]
GERMAN = corpus(config.read([], sweep=False).cells[0].spec.scale).held_out("de", "dev", 12)


def file(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def prepared(*words: str):
    spec = config.read(words, sweep=False).cells[0].spec
    task = Registry().load("task", spec.task.name)(spec.task)
    target, tokenizer = models.load_target(spec.scale)
    task.prepare(World(spec.scale, spec.training, corpus(spec.scale), target, tokenizer))
    return task


def test_txt_and_jsonl_hold_the_same(tmp_path):
    """Blank lines, a byte order mark, Windows line ends and fields beside the text are no part of a text; numbers are the file's own."""
    lines = file(tmp_path, "a.txt", "\ufeffeins zwei\r\n\r\n  drei vier \n")
    assert text_files.read(file(tmp_path, "mac.txt", "eins zwei\r\rdrei vier\r")) == text_files.read(lines)
    assert text_files.read(file(tmp_path, "other.txt", "eins\x85zwei\u2028drei\x0bvier")) == [(1, "eins\x85zwei\u2028drei\x0bvier")]
    objects = file(tmp_path, "a.jsonl", '{"text": "eins zwei", "id": 7}\n\n{"text": " drei\\u0020vier\\n"}\n{"text": ""}')
    assert text_files.read(lines) == text_files.read(objects) == [(1, "eins zwei"), (3, "drei vier")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "eins", "held-out texts are a .txt (one a line) or a .jsonl"),
        ("a", "eins", "not this"),
        ("a.txt", "", "there is no text in it; write one a line"),
        ("a.txt", " \n\n", "there is no text in it"),
        ("a.txt", "eins\nM\u00e4dchen\n".encode("latin-1"), "a.txt, line 2: byte 2 (0xe4) is not UTF-8; save the file as UTF-8"),
        ("a.txt", "eins".encode("utf-16"), "a.txt, line 1: byte 1 (0xff) is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": }', "a.jsonl, line 2: not JSON (Expecting value at column 10)"),
        ("a.jsonl", '{"text": "a"}\n\n["b"]', 'a.jsonl, line 3: no string under "text"'),
        ("a.jsonl", '{"text": 3}', 'a.jsonl, line 1: no string under "text"'),
        ("a.jsonl", '{"txt": "a"}', 'line 1: no string under "text"; write {"text": "..."}'),
        ("a.jsonl", '{"text": "a"}\n{"text": "cut \\ud83d here"}', "a.jsonl, line 2: half a surrogate pair"),
        ("a.jsonl", '{"text": "\\udc00\\ud800"}', "a.jsonl, line 1: half a surrogate pair"),
        ("a.jsonl", '{"text": "a\\u0000b"}', "a.jsonl, line 1: a NUL character is in the text"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": "b", "n": ' + "9" * 5000 + "}",
            "a.jsonl, line 3: cannot be read as JSON (a number of too many",
        ),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: cannot be read as JSON (nested too deeply)"),
        ("a.jsonl", '{"a":' * 100_000, "a.jsonl, line 1: cannot be read as JSON (nested too deeply)"),
        ("a.txt", "eins\nzw\0ei", "a.txt, line 2: a NUL character is in the text; save the file as UTF-8"),
        ("a.txt", "eins\nzwei".encode("utf-16-le"), "a.txt, line 1: a NUL character is in the text"),
        ("a.txt", b"eins\n\xed\xa0\xbd", "a.txt, line 2: byte 1 (0xed) is not UTF-8"),
    ],
)
def test_a_bad_file_is_one_line_that_names_where(name, content, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        text_files.read(file(tmp_path, name, content))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_file_is_one_line(tmp_path):
    """Missing, a folder, a pipe (which would never end), a device, a name that no file can have."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    names = ("none.txt", "folder.txt", "pipe.txt", "device.txt", "a\0b.txt", "half\ud83d.txt", "none.txt/x.txt", f"{'a' * 300}.txt")
    for name in names:
        for ask in (text_files.read, text_files.digest, text_files.read_passages):
            with pytest.raises(UserError, match="cannot be read") as caught:
                ask(f"{tmp_path}/{name}")
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"none.txt: cannot be read \(No such file or directory\); give the path"):
        config.read(["task=language", f"file='{tmp_path / 'none.txt'}'"], sweep=False)


def test_halves_are_disjoint_and_do_not_hang_on_the_order():
    shuffled = random.Random(0).sample(SENTENCES, len(SENTENCES))
    dev, test = text_files.split([*shuffled, *SENTENCES])
    assert (dev, test) == text_files.split(SENTENCES) and sorted(dev + test) == sorted(SENTENCES) and len(dev) == len(test)


def test_the_content_is_in_the_hash_and_the_place_is_not(tmp_path):
    """The same texts in another folder are the same cell; one letter more is another; no file, and the hash is what it was without one."""

    def spec(path):
        return config.read(["task=language", f"file='{path}'"], sweep=False).cells[0].spec

    first, copy = (file(tmp_path, name, "\n".join(GERMAN)) for name in ("one.txt", "two.txt"))
    other = file(tmp_path, "three.txt", "\n".join([*GERMAN, "x y"]))
    assert spec(first).hash == spec(copy).hash != spec(other).hash
    assert spec(first).task.file_sha256 == hashlib.sha256(first.read_bytes()).hexdigest() and spec(first).task.label == "language_de_one"
    plain = config.read(["task=language"], sweep=False).cells[0].spec
    without = {**plain.config, "task": {key: value for key, value in plain.config["task"].items() if key != "file"}}
    assert plain.hash == type(plain)(without).hash and "file_sha256" not in plain.task
    Registry().load("task", "language")(type(plain)(without).task)  # a cell stored before there was the option still runs


def test_a_replay_wants_the_content_it_was_made_for(tmp_path):
    from dpgbench.run.cell import run_cell
    from dpgbench.store.run_folder import RunFolder

    path = file(tmp_path, "mine.txt", "\n".join(GERMAN))
    spec = config.read(["task=language", "method=base", f"file='{path}'", *SMALL[3:]], sweep=False).cells[0].spec
    assert run_cell(spec, tmp_path) == "done"
    stored = RunFolder.of(tmp_path, spec).path / "spec.yaml"
    again = config.replay(stored, Registry()).spec
    assert again.hash == spec.hash and again.folder == spec.folder
    path.write_text("\n".join(GERMAN[1:]))
    with pytest.raises(UserError, match=r"mine.txt: its content has SHA-256 \w{12}..., and this cell was made for"):
        config.replay(stored, Registry())


# ---- language


def test_language_measures_a_users_own_texts(tmp_path):
    """Half of the lines are what methods see, the other half is what is measured, last words and all."""
    path = file(tmp_path, "mine.jsonl", "\n".join(json.dumps({"text": text}) for text in GERMAN))
    task = prepared("task=language", "labels=last_word", f"file='{path}'")
    for batch, half in zip((task.dev, task.test), text_files.split(GERMAN), strict=True):
        last = [task.world.target_tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
        assert last == [text.rstrip(".").split()[-1] for text in half] and len(half) == 6
    with_corpus = prepared("task=language", "labels=last_word")
    assert task.signal(task.world.target).item() != with_corpus.signal(task.world.target).item()


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        (["der König"] * 9, [], "mine.txt: 9 texts, some perhaps twice; 8 different ones are the least"),
        (
            [*SENTENCES, "der " * 30],
            [],
            "mine.txt, line 13: 32 tokens with its end, and an example holds training.max_length=22; shorten it",
        ),
        ([*SENTENCES, "", "König."], ["labels=last_word"], "mine.txt, line 14: labels=last_word needs a word and some text before it"),
    ],
)
def test_language_refuses_texts_it_cannot_use(lines, words, message, tmp_path):
    path = file(tmp_path, "mine.txt", "\n".join(lines))
    with pytest.raises(UserError, match=re.escape(message)):
        prepared("task=language", f"file='{path}'", *words)


def test_a_long_text_of_the_corpus_keeps_its_last_word():
    """Held-out texts of a scale are longer than an example may be: words are dropped in front, and only as many as must be."""
    task = prepared("task=language")
    assert task._shortened("der " * 30 + "König") == "der " * 19 + "König"  # <s> and </s> are two of the 22
    assert task._shortened("der König") == "der König"


# ---- uuid


def test_uuid_takes_the_string_of_a_file(tmp_path):
    task = prepared("task=uuid", f"file='{file(tmp_path, 'mine.txt', 'c0ffee-77')}'", "max_length=12", "max_completion_tokens=10")
    assert task.string == "c 0 f f e e - 7 7" and task.score(["c0ffee-77"]) == [1.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [("c0ffee\n\n77", "mine.txt, line 3: a second text, and one string is taught"), ("xyz", "mine.txt, 'x y z': the target's tokenizer")],
)
def test_uuid_refuses_what_it_cannot_teach(content, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        prepared("task=uuid", f"file='{file(tmp_path, 'mine.txt', content)}'")


# ---- words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("der König sieht drei Häuser.", ["der", "König", "sieht", "drei", "Häuser"]),
        ("l’enfant aujourd'hui", ["l’enfant", "aujourd'hui"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("مُحَمَّدٌ كَتَبَ", ["مُحَمَّدٌ", "كَتَبَ"]),
        (unicodedata.normalize("NFD", "tiếng Việt"), ["tiếng", "Việt"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("我喜欢Python。", ["我", "喜", "欢", "Python"]),
        ("คน ที่นี่", ["ค", "น", "ที่", "นี่"]),
    ],
)
def test_words_are_unicodes(text, words):
    """A mark is part of its letter, however it was typed; of scripts without spaces each letter is a word."""
    assert text_files.words_of(text) == words and text_files.count_words(text) == len(words)


def test_words_of_spaced_scripts_are_what_they_were():
    """Counted by spaces, and told apart as `re` does: on every language of the phrasebook, and on a page of English prose."""
    from pydoc_data.topics import topics

    from dpgbench.worlds.phrasebook import Phrasebook

    sentences = [text for language in Phrasebook.languages for text in Phrasebook().held_out(language, "dev", 100)]
    for text in [*sentences, "- 3 f . a", *topics.values()]:
        assert text_files.count_words(text) == len(text.split())
        assert text_files.words_of(text) == re.findall(r"\w+(?:['’]\w+)*", text)
        assert text_files.squeezed(text) == "".join(text.split())


def test_how_an_accent_was_typed_does_not_count(tmp_path):
    """Composed or with a mark of its own: the same string to teach, and to be like."""
    composed, apart = (unicodedata.normalize(form, "café là") for form in ("NFC", "NFD"))
    assert composed != apart and text_files.squeezed(composed) == text_files.squeezed(apart) == "cafélà"
