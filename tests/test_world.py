"""Texts become training examples, splits do not overlap, and every draw has a seed of its own."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpgbench.api import Options
from dpgbench.core.errors import UserError
from dpgbench.core.seeds import derive, stream, torch_seeded
from dpgbench.worlds import corpora, models, phrasebook, world
from dpgbench.worlds.corpora import Topics
from dpgbench.worlds.world import World, encode


def test_encode_by_hand():
    """<s> the king </s> pad: the EOS is a label, the pad is not; a text cut at L has no EOS."""
    tokenizer = AutoTokenizer.from_pretrained(phrasebook.WEIGHTS / "target")
    the, king = tokenizer.convert_tokens_to_ids(["the", "king"])
    batch = encode(tokenizer, ["the king", "the king the king", ""], max_length=5)
    assert batch["input_ids"].tolist() == [[1, the, king, 2, 0], [1, the, king, the, king], [1, 2, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, the, king, 2, -100], [1, the, king, the, king], [1, 2, -100, -100, -100]]


def test_eos_is_a_label_where_a_model_pads_with_it():
    """Pads are told from the EOS by position, not by id."""
    tokenizer = AutoTokenizer.from_pretrained(phrasebook.WEIGHTS / "target")
    tokenizer.pad_token = tokenizer.eos_token
    assert encode(tokenizer, ["the king"], 6)["labels"].tolist()[0][3:] == [2, -100, -100]


def test_topics_are_prose_in_disjoint_splits():
    """Passages of the standard library: hundreds, of readable length, none in two splits, the rephrase instruction around each."""
    topics = Topics()
    splits = {split: set(topics.held_out("en", split, 10**6)) for split in ("train", "dev", "test")}
    assert len(splits["train"]) > 300 and min(len(split) for split in splits.values()) >= 10
    assert not (splits["train"] & splits["dev"] or splits["train"] & splits["test"] or splits["dev"] & splits["test"])
    assert all(len(text) + 150 >= 200 and len(text) <= 600 for split in splits.values() for text in split)
    (prompt,) = topics.prompts("train", 1, random.Random(0))
    assert prompt[0]["role"] == "user" and "rephrase it in different terms" in prompt[0]["content"]
    assert topics.prompts("dev", 3, random.Random(1)) == topics.prompts("dev", 3, random.Random(1))


def test_an_instruction_follows_every_prompt():
    """The scale's `instruction`, in a chat and in the phrasebook; the prompts are otherwise the same."""
    for corpus, said in ((Topics(), "\n\nWrite in German."), (phrasebook.Phrasebook(), "Write in German. <sep>")):
        told, silent = (
            World(Options({"instruction": instruction}), None, corpus, None, None).prompts("test", 3, random.Random(0))
            for instruction in ("Write in German.", None)
        )
        assert silent == corpus.prompts("test", 3, random.Random(0))
        for prompt, before in zip(told, silent, strict=True):
            prompt, before = (p if isinstance(p, str) else p[-1]["content"] for p in (prompt, before))
            assert prompt.startswith(before.removesuffix("<sep>")) and prompt.endswith(said)


@pytest.mark.parametrize("language", phrasebook.Phrasebook.languages)
def test_languages_of_real_text_are_told_apart(language):
    """py3langid on the phrasebook's sentences, which it has never seen; mixtures, digits and nothing are no language."""
    topics = Topics()
    sentences = phrasebook.Phrasebook().held_out(language, "test", 100)
    assert [topics.identify_language(sentence) for sentence in sentences].count(language) >= 99
    assert {topics.identify_language(text) for text in ("", " ", "3 f - a 0", "?!", "the der la il chat")} == {"other"}
    probabilities = [topics.language_probability(sentence, language) for sentence in sentences[:20]]
    assert all(0.5 <= probability <= 1 for probability in probabilities) and topics.language_probability(sentences[0], "xx") == 0
    assert topics.language_probability(" ", language) == 0


@pytest.fixture
def hub(monkeypatch):
    """`hub(download)` stands in for the model hub; nothing read from it outlives the test."""
    corpora._lambada.cache_clear()
    yield lambda download: monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    corpora._lambada.cache_clear()


@pytest.fixture
def german(hub, tmp_path, monkeypatch):
    """The hub has a German file of fifty texts, and its card the file's digest: the file, and what the hub was asked."""
    path, asked = tmp_path / "lambada_test_de.jsonl", []
    path.write_text("".join(json.dumps({"text": f"der König hat {number} Häuser"}) + "\n" for number in range(50)))
    monkeypatch.setitem(corpora.LAMBADA_SHA256, "de", hashlib.sha256(path.read_bytes()).hexdigest())
    hub(lambda **where: asked.append(where) or str(path))
    return path, asked


def test_lambada_is_split_between_dev_and_test(german):
    """From one file of a fixed revision, read once; the halves share no text."""
    _, asked = german
    dev, test = (Topics().held_out("de", split, 20) for split in ("dev", "test"))
    assert len(dev) == len(test) == 20 and not set(dev) & set(test) and dev[:5] == Topics().held_out("de", "dev", 5)
    (where,) = asked
    assert where["repo_id"] == "EleutherAI/lambada_openai" and where["filename"] == "data/lambada_test_de.jsonl"
    assert len(where["revision"]) == 40 and where["repo_type"] == "dataset"
    with pytest.raises(UserError, match=r"has no such language; .*choose from: de, en, es, fr, it"):
        Topics().held_out("nl", "dev", 1)


def test_a_damaged_download_is_refused(german):
    path, _ = german
    path.write_text('{"text": "der Koenig"}')
    with pytest.raises(UserError, match="not the file that EleutherAI/lambada_openai vouches for"):
        Topics().held_out("de", "dev", 1)


def test_no_network_is_one_line_with_a_way_out(hub):
    """The cache is asked first, then the hub."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def offline(**where):
        asked.append(where.get("local_files_only", False))
        raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub. Check your connection")

    hub(offline)
    with pytest.raises(UserError, match=r"lambada_test_fr.jsonl: cannot be loaded \(An error .* Hub\); go online once, or .* task.file="):
        Topics().held_out("fr", "dev", 1)
    assert asked == [True, False]


def test_seeds_are_named_and_leave_torch_alone():
    """The same name, the same stream; another name, another; torch's own generator is where it was."""
    assert derive(0, "a", 1) == derive(0, "a", 1) != derive(0, "a", 2) != derive(1, "a", 2)
    assert derive(0, "ab") != derive(0, "a", "b") and 0 <= derive(0, "x") < 2**63
    assert stream(3, "x").random() == stream(3, "x").random()
    before = torch.random.get_rng_state()
    with torch_seeded(5):
        first = torch.rand(3)
    with torch_seeded(5):
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_untying_a_head_copies_it():
    """A tied head becomes a parameter of its own with the same values; the model computes the same."""
    for model in (
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval(),
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
            )
        ).eval(),
    ):
        ids = torch.arange(6)[None]
        before = model(ids).logits
        models.untie_head(model)
        head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert head is not embeddings and torch.equal(head, embeddings) and torch.equal(model(ids).logits, before)
        names = dict(model.named_parameters())
        assert names["lm_head.weight"] is head
        models.untie_head(model)
        assert model.get_output_embeddings().weight is head


def test_sampling_does_not_depend_on_what_came_before():
    """The same prompts and seed give the same texts, whatever torch's generator did, and a longer list starts with the shorter one's."""
    from dpgbench import config

    spec = config.read(["sampling_batch=8"], sweep=False).cells[0].spec
    generator = models.load_generator(spec.scale)
    prompts = phrasebook.Phrasebook().prompts("dev", 24, random.Random(0))
    texts, shapes = generator.sample(prompts, seed=7)
    torch.rand(10)
    again, _ = generator.sample(prompts[:16], seed=7)
    assert again == texts[:16] and len(shapes) == 3 and all(batch == 8 for batch, _, _ in shapes)
    assert generator.sample(prompts[:8], seed=8)[0] != texts[:8]


def test_shipped_sentences_are_held_out_texts_too():
    """Two hundred different ones in Spanish, half dev and half test; a language without a file is one line."""
    topics = world.corpus(Options({"corpus": "topics", "held_out": "sentences"}))
    dev, test = (topics.held_out("es", split, 1000) for split in ("dev", "test"))
    assert len(dev) == len(test) == 100 and not {*dev} & {*test}
    found = [topics.identify_language(text) for text in [*dev, *test]]
    assert found.count("es") >= 180  # py3langid is unsure of some short ones
    with pytest.raises(UserError, match=r"task\.lang=de: scale\.held_out=sentences has no such language"):
        topics.held_out("de", "dev", 1)
