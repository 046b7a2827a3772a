"""What is typed is what is meant: texts as they are, numbers by Hydra's grammar, and one way to write anything."""

from __future__ import annotations

import re
import subprocess

import pytest

from dpgbench import config
from dpgbench.config import overrides
from dpgbench.core.errors import UserError


def spec_of(*words: str):
    return config.read(words, sweep=False).cells[0].spec


@pytest.mark.parametrize("word", ["1.10", "1_0", "1e3", "2024_11_26", "null", "false", "0x10", "+5", "ergebnisß", "my runs", "a, b", "x=1"])
def test_names_and_folders_are_what_was_typed(word):
    request = config.read([f"name={word}", f"results={word}"], sweep=True)
    assert request.suite == word and str(request.results) == word


@pytest.mark.parametrize(
    "text",
    [
        "Écris en français.", "Don't write in English.", "Write in German (only).", "Write in German; briefly.", "Write in German, please.",
        "Is it? Yes! #1: 'so' & \"so\"", "a=b", "emoji 🎉 and tab\tand\nnew line", "[red]", "{a}", "50%",
        "'tis the season, and more", "true", "7",
    ],
)  # fmt: skip
def test_a_sentence_is_one_value_as_typed(text):
    assert spec_of("method=base", f"scale.instruction={text}").scale.instruction == text


@pytest.mark.parametrize(
    "word",
    ["language", "dpg_sgd", "_", "a1", "True", "null", "NULL", "nan", "Inf", "true", "nullable", "0", "7", "2024", "007", "1_0", "12e3",
     "999999999999999999", "1000000000000000000000", "a-b", "a.b", "ä", "٣"],
)  # fmt: skip
def test_names_and_whole_numbers_are_read_as_the_grammar_reads_them(word, monkeypatch):
    """Without Hydra, whose import takes longer than most commands; and as with it."""
    overrides._read.cache_clear()
    found = overrides._read(word)
    overrides._read.cache_clear()
    never = re.compile("(?!)")
    monkeypatch.setattr(overrides, "_PLAIN", never)
    monkeypatch.setattr(overrides, "_WHOLE", never)
    by_grammar = overrides._read(word)
    overrides._read.cache_clear()
    assert repr(found) == repr(by_grammar)


def test_a_comma_separates_unless_a_space_follows_or_quotes_are_around_it():
    """Of texts; a list of numbers or of names may have spaces."""

    def instructions(typed):
        return [cell.spec.scale.instruction for cell in config.read([f"scale.instruction={typed}"], sweep=True).cells]

    assert instructions("Write in German,Write in French, please") == ["Write in German", "Write in French, please"]
    assert instructions("'a,b', \"c, d\"") == ["a,b", "c, d"]
    assert instructions("Write (a,b),c") == ["Write (a,b)", "c"]
    assert instructions("a\\,b") == ["a,b"]
    specs = [cell.spec for cell in config.read(["seed=0, 1", "task=l2_norm, sixseven"], sweep=True).cells]
    assert len(specs) == 4
    with pytest.raises(UserError, match="separate values as in lang=de,es"):
        config.read(["lang=de, es"], sweep=True)


def test_options_that_are_words_take_digits_and_null_where_a_file_says_null():
    assert spec_of("task=qr", "payload=2024").task.payload == "2024"
    assert [spec_of("task=uuid", f"text={text}").task.text for text in ("12345678", "1e10", "null")] == ["12345678", "1e10", "null"]
    scale = spec_of("generator_revision=1234567", "corpus_column=1", "target_revision=null").scale
    assert (scale.generator_revision, scale.corpus_column, scale.target_revision) == ("1234567", "1", None)
    assert spec_of("task=uuid", "scale.instruction=null").scale.instruction is None  # whose recipe has a sentence
    assert spec_of("task=uuid", "scale.instruction='null'").scale.instruction == "null"
    assert spec_of("method=dpg_sgd", "inner_optimizer=null").method.inner_optimizer is None
    assert spec_of("checkpoint=2").training.checkpoint == 2 and spec_of("checkpoint=sqrt").training.checkpoint == "sqrt"
    launcher = config.read(["launcher=slurm", "launcher.sbatch.comment=2024_11_26", "launcher.account=007"], sweep=True).launcher
    assert launcher.sbatch.comment == "2024_11_26" and launcher.account == "007"


def test_quoted_digits_are_the_same_cell_as_plain_ones():
    assert spec_of("task=uuid", "text='12345678'").hash == spec_of("task=uuid", "text=12345678").hash


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("results=a,b", "one value is wanted and this is 2; write \"results='a,b'\""),
        ("name=../x", "names files and a folder"),
        ("name=runs", "names files and a folder"),
        ("name=", "a value is missing"),
        ("seed=0,", "a value is missing"),
        ("file=${oc.env:HOME}/x.txt", "${...} is not filled in here"),
        ("scale.instruction=???", "to OmegaConf that is a value still missing"),
        ("name=\udcff", "not UTF-8"),
        ("seed=" + "1" * 5000, "expected a whole number"),
        ("seed=1" + "0" * 30, "64 bits"),
        ("policy.lr=1" + "0" * 400, "must be finite"),
        ("policy.lr=null", "expected a number, such as policy.lr=0.002"),
        ("max_length=null", "expected a whole number"),
        ("training.betas=0.9", "expected a list, such as training.betas=[0.9,0.95]"),
        ("training.betas=[0.9", "expected a list"),
        ("training.betas=[0.9]", "two decay rates"),
        ("training.betas=[0.9,high]", "high is of another kind than what is in training.betas=[0.9,0.95]"),
        ("training.betas=[0.9,nan]", "must be finite"),
        ("languages=[1]", "1 is of another kind"),
        ("policy=1", "a whole section; set its options one by one"),
        ("cross_group=1", "expected true or false, such as method.cross_group=true"),
        ("steps=6€", "expected a whole number, such as policy.steps=140"),
        ("seed=" + "[" * 3000, "expected a whole number"),
        ("seed=range(0,1000000000)", "more than 100000 values"),
        ("seed=glob(*)", "expected a whole number"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line(word, says):
    with pytest.raises(UserError) as caught:
        config.read([word], sweep=True)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text", ["plain", "a,b", "it's, so", "'", '"$HOME" `x` !', "back\\slash,", "null", " led ", "é (ü), ?", "1.10", "a\nb,c"]
)
def test_the_form_that_is_shown_works_when_it_is_pasted(text):
    """Through a shell and back."""
    shown = overrides.for_shell("scale.instruction", text)
    pasted = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, text=True, check=True).stdout
    (word,) = overrides.as_texts(overrides.parse([pasted])["scale.instruction"])
    assert word == text


def test_a_run_of_a_sentence_with_a_bare_comma_shows_how_to_write_it():
    with pytest.raises(UserError, match=r"or \"scale\.instruction='Write in German,please\.'\" for one value with a comma"):
        spec_of("scale.instruction=Write in German,please.")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("taks=language", "task"), ("polcy.lr=1", "policy.lr"), ("lnag=de", "task.lang"), ("sed=1", "seed"), ("mehtod=dpg", "method"),
     ("training.steps=2", "policy.steps"), ("stpes=1", "policy.steps"), ("resluts=x", "results"), ("lunacher=local", "launcher")],
)  # fmt: skip
def test_a_key_is_found_by_its_spelling(wrong, right):
    with pytest.raises(UserError, match=f"did you mean {right}\\?"):
        config.read([wrong], sweep=True)
