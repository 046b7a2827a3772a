"""Prompts from passages of the user's choice: a file or a hub's data set, in three splits, worded for any generator, not too long."""

from __future__ import annotations

import json
import random
import re

import datasets
import pytest
from conftest import SMALL
from test_models import save_gpt2, save_llama
from transformers import AutoTokenizer

from dpgbench import config
from dpgbench.api import Options
from dpgbench.cli import main
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import RunFolder
from dpgbench.worlds import world
from dpgbench.worlds.corpora import SPLITS
from dpgbench.worlds.prompts import CUE, Room, Wording, lengths

PASSAGES = [f"Passage {number} is about the number {number * number} and nothing else." for number in range(60)]
CHAT = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def scale(corpus, **more) -> Options:
    return Options({"corpus": str(corpus), **more})


def passages_of(corpus, split: str) -> set[str]:
    """What a thousand draws of a split are about."""
    prompts = corpus.prompts(split, 1000, random.Random(0))
    return {text.split("only.\n\n")[1].removesuffix(CUE) for prompt in prompts for text in [prompt[0]["content"]]}


@pytest.fixture
def written(tmp_path):
    """The passages as a file of every kind; the second in another order, with one of them twice and a blank line."""
    import pandas

    (tmp_path / "a.txt").write_text("\n".join(PASSAGES))
    lines = [json.dumps({"body": text}) for text in [*reversed(PASSAGES), PASSAGES[5]]]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines))
    pandas.DataFrame({"id": range(61), "body": [*PASSAGES, None]}).to_parquet(tmp_path / "c.parquet")
    return [scale(tmp_path / "a.txt"), *(scale(tmp_path / name, corpus_column="body") for name in ("b.jsonl", "c.parquet"))]


def test_every_kind_of_file_has_the_same_three_splits(written):
    """Disjoint, whole, and the same whatever the format, the order and the repetitions."""
    found = [{split: passages_of(world.corpus(one), split) for split in SPLITS} for one in written]
    assert found[0] == found[1] == found[2]
    assert found[0]["train"] | found[0]["dev"] | found[0]["test"] == set(PASSAGES)
    assert [len(found[0][split]) for split in ("train", "dev", "test")] == [54, 3, 3]
    corpus = world.corpus(written[0])
    assert set(corpus.held_out("en", "test", 9)) == found[0]["test"] and corpus.identify_language(PASSAGES[0]) == "en"


@pytest.mark.parametrize(
    ("content", "column", "says"),
    [
        (None, "text", "not a parquet file"),
        ({"text": ["a"] * 50}, "text", "1 different texts, and three splits need 20"),
        ({"body": PASSAGES}, "text", "scale.corpus_column=text: .* has body; write one of them"),
        ({"text": list(range(30))}, "text", "row 1: no string under 'text'"),
        (
            {"text": [["a"]] * 30, "body": PASSAGES[:30]},
            "text",
            "row 1: no string under 'text'; give a column .*one of: body",
        ),
        ({"text": [*PASSAGES, "a\0b"]}, "text", "row 61: a NUL character is in the text"),
    ],
)
def test_files_that_will_not_do_are_one_line(content, column, says, tmp_path):
    import pandas

    path = tmp_path / "x.parquet"
    path.write_text("PAR") if content is None else pandas.DataFrame(content).to_parquet(path)
    with pytest.raises(UserError, match=says) as caught:
        world.corpus(scale(path, corpus_column=column))
    assert "\n" not in str(caught.value)


def test_a_files_content_is_part_of_the_cell_and_its_path_is_not(tmp_path):
    first, moved, other = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"
    for path, texts in ((first, PASSAGES), (moved, PASSAGES), (other, PASSAGES[1:])):
        path.write_text("\n".join(texts))
    specs = [config.read([f"scale.corpus={path}"], sweep=False).cells[0].spec for path in (first, moved, other)]
    assert specs[0].hash == specs[1].hash != specs[2].hash
    first.write_text("changed")
    with pytest.raises(UserError, match="its content has SHA-256"):
        world.corpus(specs[0].scale)
    for corpus, says in ((f"{tmp_path}/none.txt", "cannot be read"), ("wiki", "scale.corpus=wiki: no such corpus; choose from")):
        with pytest.raises(UserError, match=says):
            config.read([f"scale.corpus={corpus}"], sweep=False)


def test_settings_that_scales_got_later_change_no_older_cell():
    """A spec stored before there were any has the hash it had."""
    spec = config.read([], sweep=False).cells[0].spec
    later = ("keep_generator", "generator_revision", "target_revision", "max_prompt_tokens")
    before = {key: value for key, value in spec.config["scale"].items() if key not in later and not key.startswith("corpus_")}
    assert len(before) < len(spec.config["scale"]) - 6
    policy = {key: value for key, value in spec.config["method"]["policy"].items() if key != "rollout_batch"}
    method = {**spec.config["method"], "policy": policy}
    assert RunSpec({**spec.config, "scale": before, "method": method}).hash == spec.hash


@pytest.fixture
def hub(monkeypatch):
    """A data set of the hub whose rows are the passages three times over, some of them blank; what was asked for."""
    asked = []
    rows = datasets.Dataset.from_dict({"text": [*PASSAGES, "", *PASSAGES, *PASSAGES]})
    rows.info.download_checksums = {f"hf://datasets/some/texts@{'ab' * 20}/a.parquet": {}}

    def load(**named):
        asked.append(named)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_data_set_of_the_hub(hub):
    """Rows are drawn by their content's split, repeated ones too; the commit is known; a wrong column says which there are."""
    corpus = world.corpus(scale("some/texts", corpus_subset="en", corpus_revision="v1"))
    found = {split: passages_of(corpus, split) for split in SPLITS}
    assert hub[0] == {"path": "some/texts", "name": "en", "revision": "v1", "split": "train"}
    assert corpus.revision == "ab" * 20
    assert set.union(*found.values()) == set(PASSAGES) and sum(map(len, found.values())) == len(PASSAGES)
    assert set(corpus.held_out("en", "dev", 100)) == found["dev"] and len(corpus.held_out("en", "train", 4)) == 4
    assert corpus.prompts("test", 5, random.Random(3)) == corpus.prompts("test", 5, random.Random(3))
    with pytest.raises(UserError, match="corpus_column=body: some/texts has text; write one of them"):
        world.corpus(scale("some/texts", corpus_column="body"))


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    def load(**named):
        raise ConnectionError("Couldn't reach 'some/texts' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"scale.corpus=some/texts: cannot be loaded \(Couldn't reach .*\); check name") as caught:
        world.corpus(scale("some/texts"))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The same tokenizer with a chat template and without."""
    folder = tmp_path_factory.mktemp("tokenizers")
    save_gpt2(folder)
    plain, chat = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat.chat_template = CHAT
    return folder, plain, chat


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("instruction", [None, "Write in German."])
def test_prompts_keep_to_their_limit_and_use_it(kind, instruction, tokenizers):
    """A long passage is cut at its end so that the whole prompt, template and instruction included, has the limit or little less."""
    _, plain, chat = tokenizers
    tokenizer = plain if kind == "plain" else chat
    wording = Wording(tokenizer, 150, instruction)
    for passage in (" ".join(PASSAGES), "ü" * 5000, "the king sees the house. " * 400):
        prompt = wording.prompt(passage)
        whole = prompt if instruction is None else wording.instruct(prompt, instruction)
        assert isinstance(whole, str) == (kind == "plain")
        assert 145 <= wording._length(whole) <= 150
        said = whole if kind == "plain" else whole[0]["content"]
        assert said.split("only.\n\n")[1][:8] == passage[:8] and (instruction is None or instruction in said)
    assert wording.prompt(PASSAGES[0]) == Wording(tokenizer).prompt(PASSAGES[0])
    with pytest.raises(UserError, match=r"scale.max_prompt_tokens=40: the instruction alone takes \d+"):
        Wording(tokenizer, 40, instruction)


def test_a_model_without_a_chat_template_reads_plain_text_that_ends_in_a_cue(tokenizers):
    _, plain, _ = tokenizers
    wording = Wording(plain)
    prompt = wording.prompt("The passage.")
    assert prompt.endswith(f"only.\n\nThe passage.{CUE}")
    assert wording.instruct(prompt, "Write in German.").endswith(f"The passage.\n\nWrite in German.{CUE}")


def test_a_wording_of_ones_own(tokenizers):
    """`scale.wording` asks in its own words, leaves room for more of the passage, and a passage's own braces are only text."""
    _, plain, chat = tokenizers
    short = Wording.of(scale("topics", wording="Rephrase: {passage}", max_prompt_tokens=60), chat)
    assert short.prompt("A {passage} of {0}.") == [{"role": "user", "content": "Rephrase: A {passage} of {0}."}]
    assert Wording.of(scale("topics", wording="Rephrase: {passage}"), plain).prompt("One.") == f"Rephrase: One.{CUE}"
    assert short.taken < Wording(chat).taken and short._length(short.prompt(" ".join(PASSAGES))) <= 60


@pytest.mark.parametrize("value", ["Rephrase.", "{passage} and {passage}", "{}"])
def test_a_wording_has_one_place_for_the_passage(value):
    with pytest.raises(UserError, match=r"scale.wording=.*write scale.wording=null"):
        config.read(["scale=small", "task=l2_norm", "method=base", f"scale.wording='{value}'"], sweep=False)


def test_a_cell_on_a_file_and_a_model_without_a_template(tokenizers, tmp_path):
    """Two steps of dpg, rollouts and deployment; the target is the phrasebook's, and no prompt is longer than its limit."""
    (tmp_path / "mine.txt").write_text("\n".join(PASSAGES))
    words = [f"scale.generator={tokenizers[0]}", f"scale.corpus={tmp_path / 'mine.txt'}", "max_prompt_tokens=107"]
    spec = config.read(["task=l2_norm", "method=dpg", *SMALL, *words], sweep=False).cells[0].spec
    assert run_cell(spec, tmp_path) == "done"
    kept = [json.loads(line) for line in (RunFolder.of(tmp_path, spec).path / "deployment.jsonl").read_text().splitlines()]
    tokenizer = tokenizers[1]
    assert all(len(tokenizer(line["prompt"])["input_ids"]) <= 107 and line["prompt"].endswith(CUE) for line in kept)


# ---- prompts that are longer than the generator can read


@pytest.fixture
def long(tokenizers, tmp_path):
    """The words for a cell whose passages are longer than its GPT-2 reads."""
    (tmp_path / "long.txt").write_text("\n".join(f"{text} {'the king sees the house. ' * 20}" for text in PASSAGES))
    words = [f"scale.generator={tokenizers[0]}", f"scale.corpus={tmp_path / 'long.txt'}", f"results={tmp_path / 'r'}"]
    return ["task=l2_norm", "method=base", "deployment_texts=8", *words]


def test_prompts_beyond_the_context_are_one_line_before_the_run(long, capsys):
    """It names the limit, and a bound with which the cell runs."""
    assert main(["run", *long]) == 2
    said = capsys.readouterr().err
    assert re.match(
        r"dpgbench: scale.generator=\S+: it reads 128 tokens, a completion .*=20, and a prompt of .*long.txt takes \d{3}; ", said
    )
    assert said.count("\n") == 1
    bound = re.search(r"write (max_prompt_tokens=\d+)\n", said)[1]
    assert main(["run", *long, bound]) == 0
    assert main(["run", *long, "max_completion_tokens=80"]) == 2
    assert "choose a generator that reads more, or fewer max_completion_tokens" in capsys.readouterr().err


def test_a_cell_started_without_the_command_line_says_it_too(long, tmp_path):
    spec = config.read(long[:-1], sweep=False).cells[0].spec
    assert run_cell(spec, tmp_path) == "failed"
    folder = RunFolder.of(tmp_path, spec).path
    assert "write max_prompt_tokens=108" in (folder / "error.txt").read_text() and not (folder / "metrics.jsonl").exists()


def test_what_a_method_says_after_a_prompt_counts(long, tmp_path):
    """A hint that does not fit beside a prompt at its limit is told of before anything is spent, with a bound that leaves it room."""
    words = ["task=length", "method=prompt_only", "samples=32", "fresh=32", *long[2:-1]]
    words += ["max_completion_tokens=8", "max_prompt_tokens=120"]
    spec = config.read(words, sweep=False).cells[0].spec
    assert run_cell(spec, tmp_path) == "failed"
    said = (RunFolder.of(tmp_path, spec).path / "error.txt").read_text()
    found = re.search(r"takes (\d+), (\d+) of them what the method says after it; write max_prompt_tokens=(\d+)", said)
    assert found and int(found[1]) == 120 + int(found[2]) and int(found[3]) == 120 - int(found[2])
    words[-1] = f"max_prompt_tokens={found[3]}"
    spec = config.read(words, sweep=False).cells[0].spec
    assert run_cell(spec, tmp_path) == "done"


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_every_prompt_is_measured_that_may_be_too_long(kind, tokenizers, tmp_path):
    """One passage in 400 by a few tokens, whatever its split; without it all is well. Instructions count, the longest of them."""
    tokenizer = tokenizers[1] if kind == "plain" else tokenizers[2]
    texts = [f"{number} is a number." for number in range(400)]
    path = tmp_path / "x.txt"
    path.write_text("\n".join(texts))
    one = scale(path, generator="g", max_completion_tokens=20, instruction=None)
    longest = max(lengths(tokenizer, world.corpus(one, tokenizer).prompts("train", 2000, random.Random(0))))
    room = Room(one, tokenizer, longest + 25)
    world.check_room(one, world.corpus(one, tokenizer), room)
    with pytest.raises(UserError, match="of them what the method says after it"):
        world.check_room(one, world.corpus(one, tokenizer), room, ["Hm.", "Write in German, and at length."])
    path.write_text("\n".join([*texts, "ein viel längerer Satz " + "ä" * 20]))
    with pytest.raises(UserError, match=r"x\.txt takes"):
        world.check_room(one, world.corpus(one, tokenizer), room)


def test_a_hubs_data_set_without_a_limit_is_one_line(tokenizers, hub, capsys, tmp_path):
    """It may be larger than anyone can look through; with the bound that is named the cell runs, torch being loaded by then."""
    words = ["task=l2_norm", "method=base", "deployment_texts=8", f"scale.generator={tokenizers[0]}", "scale.corpus=some/texts"]
    assert main(["run", *words, f"results={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "scale.corpus=some/texts: a data set of the hub is not looked through" in said and said.count("\n") == 1
    assert main(["run", *words, f"results={tmp_path}", re.search(r"max_prompt_tokens=\d+", said)[0]]) == 0


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([[{"role": "user", "content": "a"}]] * 3, "row 1: no string under 'x'; give a column of texts with corpus_column=, one of: text"),
        ([7, 8, 9], "row 1: no string under 'x'"),
        ([[0.5], None, [1.0]], "row 1: no string under 'x'"),
    ],
)
def test_a_hubs_column_that_holds_no_texts_is_refused(rows, says, monkeypatch):
    table = datasets.Dataset.from_dict({"x": rows, "text": ["a", "b", "c"], "id": [1, 2, 3]})
    monkeypatch.setattr(datasets, "load_dataset", lambda **named: table)
    with pytest.raises(UserError, match=re.escape(says)):
        world.corpus(scale("some/chats", corpus_column="x"))


def test_rotary_positions_have_an_end_too(tmp_path, capsys):
    """Such a model would go on without a word, and write badly."""
    save_llama(tmp_path / "llama")
    words = ["task=l2_norm", "method=base", "deployment_texts=8", f"scale.generator={tmp_path / 'llama'}", f"results={tmp_path / 'r'}"]
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert "it reads 64 tokens" in said and said.endswith("choose a generator that reads more, or fewer max_completion_tokens\n")
