"""The phrasebook world keeps its promises: sentences, splits, language identification, tokenizer, weights, pretraining."""

from __future__ import annotations

import random
import subprocess
import sys
import uuid

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpgbench.worlds.phrasebook import WEIGHTS, Phrasebook, grammar, pretrain
from dpgbench.worlds.phrasebook.grammar import LANGUAGES, ORDERS, SPLITS, TABLES, Idea
from dpgbench.worlds.phrasebook.tokenizer import SPECIAL_TOKENS, build_tokenizer, expected_word_counts, vocabulary

MODELS = ("generator", "target")


@pytest.fixture
def rng() -> random.Random:
    return random.Random("test_phrasebook")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def generator():
    return AutoModelForCausalLM.from_pretrained(WEIGHTS / "generator"), AutoTokenizer.from_pretrained(WEIGHTS / "generator")


def random_idea(rng: random.Random) -> Idea:
    return Idea(**{part: rng.randrange(len(table)) for part, table in TABLES.items()})


def random_sentences(language: str, rng: random.Random, count: int = 300) -> list[str]:
    return [grammar.say(random_idea(rng), language, rng.randrange(len(ORDERS))) for _ in range(count)]


def every_idea_once() -> list[Idea]:
    """As many ideas as the longest table is long, so that every row of every table occurs."""
    longest = max(map(len, TABLES.values()))
    return [Idea(**{part: row % len(table) for part, table in TABLES.items()}) for row in range(longest)]


# --- Grammar ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "at_least"), [("subject", 20), ("verb", 15), ("object", 20), ("place", 12), ("time", 8)])
def test_tables_are_complete(part: str, at_least: int) -> None:
    """Every table is long enough, and every entry has one clean, non-empty phrase per language; no phrase occurs twice."""
    table = TABLES[part]
    assert len(table) >= at_least
    for entry in table:
        assert len(entry) == len(LANGUAGES)
        assert all(phrase and phrase == " ".join(phrase.split()) and "." not in phrase for phrase in entry)
    for language in LANGUAGES:
        assert len(set(grammar.phrases(language)[part])) == len(table)


def test_at_least_three_orders_in_every_language() -> None:
    """Every language has a pattern for every word order, each with the five parts once, no two alike."""
    assert len(ORDERS) >= 3
    for language in LANGUAGES:
        patterns = grammar.PATTERNS[language]
        assert len(set(patterns)) == len(ORDERS)
        assert all(sorted(pattern.split()) == sorted(TABLES) for pattern in patterns)


def test_german_keeps_the_verb_second() -> None:
    """German is verb-second in every order: exactly one part stands before the verb."""
    assert all(pattern.split()[1] == "verb" for pattern in grammar.PATTERNS["de"])


def test_known_sentences() -> None:
    """A few sentences, written out by hand, come out letter by letter."""
    idea = Idea(subject=3, verb=6, object=5, place=5, time=0)
    assert grammar.say(idea, "en", 0) == "the child hides the golden key under the bridge today."
    assert grammar.say(idea, "de", 1) == "heute versteckt das Kind unter der Brücke den goldenen Schlüssel."
    assert grammar.say(idea, "es", 2) == "bajo el puente el niño esconde la llave dorada hoy."
    assert grammar.say(idea, "fr", 1) == "aujourd'hui l'enfant cache la clé dorée sous le pont."
    assert grammar.say(idea, "it", 0) == "il bambino nasconde la chiave dorata sotto il ponte oggi."


def test_rude_sentences() -> None:
    """One word before the noun makes any English sentence rude, taking it out makes it polite again, and it stays English."""
    idea = Idea(subject=3, verb=6, object=5, place=5, time=0)
    rude = grammar.say(idea, "en", 1, "stupid")
    assert rude == "today the stupid child hides the golden key under the bridge."
    assert grammar.is_rude(rude) and not grammar.is_rude(grammar.politely(rude))
    assert grammar.politely(rude) == grammar.say(idea, "en", 1)
    assert grammar.identify_language(rude) == "en"
    for every in every_idea_once():
        assert grammar.politely(grammar.say(every, "en", 0, "damned")) == grammar.say(every, "en", 0)
    assert not any(grammar.is_rude(grammar.say(every, language, 0)) for every in every_idea_once() for language in LANGUAGES)


def test_brief_sentences() -> None:
    assert grammar.say_briefly(Idea(subject=3, verb=6, object=5, place=5, time=0)) == "the child hides the golden key."


def test_understand_inverts_say(rng: random.Random) -> None:
    """understand(say(idea, language, order)) returns all three, and None for a text that is no sentence."""
    for language in LANGUAGES:
        for idea in [random_idea(rng) for _ in range(50)] + every_idea_once():
            order = rng.randrange(len(ORDERS))
            assert grammar.understand(grammar.say(idea, language, order)) == (idea, language, order)
    assert grammar.understand("the child hides") is None


def test_no_two_languages_share_a_sentence(rng: random.Random) -> None:
    """An idea sounds different in every language and order, so a sentence has one language."""
    for idea in [random_idea(rng) for _ in range(300)] + every_idea_once():
        sentences = {grammar.say(idea, language, order) for language in LANGUAGES for order in range(len(ORDERS))}
        assert len(sentences) == len(LANGUAGES) * len(ORDERS)


def test_splits_are_disjoint_exhaustive_and_stable(rng: random.Random) -> None:
    """Every idea is in exactly one split, about 90/5/5; a draw stays in its split; known ideas stay where they are."""
    drawn = {split: set(grammar.draw_ideas(split, 1000, rng)) for split in SPLITS}
    assert all(grammar.split_of(idea) == split for split in SPLITS for idea in drawn[split])
    assert not (drawn["train"] & drawn["dev"] or drawn["train"] & drawn["test"] or drawn["dev"] & drawn["test"])
    sample = [grammar.split_of(random_idea(rng)) for _ in range(20_000)]
    for split, share in zip(SPLITS, (0.90, 0.05, 0.05), strict=True):
        assert sample.count(split) / len(sample) == pytest.approx(share, abs=0.01)
    pinned = {Idea(0, 0, 0, 0, 0): "train", Idea(0, 0, 0, 0, 5): "dev", Idea(0, 3, 0, 0, 0): "test"}
    assert {idea: grammar.split_of(idea) for idea in pinned} == pinned


def test_draws_depend_on_the_generator_handed_in_alone() -> None:
    """The same seed draws the same ideas, another seed others; the global generator is not touched."""
    before = random.getstate()
    first, again, other = (grammar.draw_ideas("train", 20, random.Random(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: grammar.draw_ideas("valid", 1, random.Random(0)), ("'valid'", "train, dev, test")),
        (lambda: grammar.say(Idea(0, 0, 0, 0, 0), "nl", 0), ("'nl'", "en, de, es, fr, it")),
        (lambda: grammar.say(Idea(0, 0, 0, 0, 0), "en", 3), ("order=3", "0 to 2")),
        (lambda: grammar.say(Idea(0, 0, 0, 0, 0), "de", 0, "stupid"), ("'stupid'", "'de'", "English")),
        (lambda: grammar.say(Idea(0, 0, 0, 0, 0), "en", 0, "silly"), ("'silly'", "stupid, idiotic")),
        (lambda: Phrasebook().held_out("de", "train"), ("'train'", "dev or test")),
        (lambda: Phrasebook().held_out("nl", "dev"), ("'nl'", "en, de, es, fr, it")),
        (lambda: pretrain.pretrain("critic"), ("'critic'", "generator, target")),
    ],
)
def test_errors_name_the_value_and_the_choices(call, names: tuple[str, ...]) -> None:
    """A wrong value is a one-line ValueError with the value and what to write instead."""
    with pytest.raises(ValueError) as error:
        call()
    assert all(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)


# --- Language identification -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_identifies_every_language(language: str, rng: random.Random) -> None:
    """Every sentence is identified as the language it was said in."""
    assert {grammar.identify_language(sentence) for sentence in random_sentences(language, rng)} == {language}


def test_salad_is_other(rng: random.Random) -> None:
    """A mixture of languages belongs to none: words at random, and halves of two sentences."""
    words = sorted(set().union(*map(grammar.words_of, LANGUAGES)))
    salads = [" ".join(rng.choices(words, k=rng.randint(6, 20))) + "." for _ in range(500)]
    assert sum(grammar.identify_language(salad) != "other" for salad in salads) <= 2
    for first in LANGUAGES:
        for second in set(LANGUAGES) - {first}:
            one, two = (random_sentences(language, rng, 1)[0].split() for language in (first, second))
            assert grammar.identify_language(" ".join(one[: len(one) // 2] + two[len(two) // 2 :])) == "other"


def test_hex_and_nothing_are_other(rng: random.Random) -> None:
    """Digits have no language, not even "a a a", which English could claim; nor has a text without words."""
    for _ in range(200):
        assert grammar.identify_language(" ".join(rng.choices("0123456789abcdef-", k=rng.randint(1, 36)))) == "other"
    assert {grammar.identify_language(text) for text in ("a", "a a a a", "", ".", "in")} == {"other"}


# --- The world -------------------------------------------------------------------------------------------------------------------


def test_prompts_are_english_only(rng: random.Random) -> None:
    """A prompt is one English sentence of the asked split and the separator: no goal, no other language."""
    for split in SPLITS:
        for prompt in Phrasebook().prompts(split, 200, rng):
            sentence, end = prompt.rsplit(" ", 1)
            assert end == "<sep>"
            assert all(word in grammar.words_of("en") for word in sentence.removesuffix(".").split())
            idea, language, _ = grammar.understand(sentence)
            assert language == "en" and grammar.split_of(idea) == split


def test_held_out_is_deterministic_parallel_and_held_out() -> None:
    """Held-out sentences never change, a short list opens a long one, languages are parallel, no idea is a training idea."""
    world = Phrasebook()
    for split in ("dev", "test"):
        understood = {language: [grammar.understand(text) for text in world.held_out(language, split, 50)] for language in LANGUAGES}
        assert all(grammar.split_of(idea) == split for idea, _, _ in understood["de"])
        for language in LANGUAGES:
            assert {found[1] for found in understood[language]} == {language}
            assert [(idea, order) for idea, _, order in understood[language]] == [(idea, order) for idea, _, order in understood["en"]]
    assert world.held_out("fr", "dev", 10) == world.held_out("fr", "dev", 50)[:10]


def test_importing_the_world_is_light() -> None:
    """`import dpgbench.worlds.phrasebook` loads neither torch nor transformers, so listing and validating stay instant."""
    code = "import sys, dpgbench.worlds.phrasebook; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- Tokenizer -------------------------------------------------------------------------------------------------------------------


def test_ids_are_laid_out_as_documented(tokenizer) -> None:
    """Special tokens are 0..4 and known as such, then "." and "-", the digits, then words by falling frequency, then rude words and those
    of instructions."""
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == list(SPECIAL_TOKENS) == ["<pad>", "<s>", "</s>", "<sep>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.sep_token_id, tokenizer.unk_token_id) == (3, 4)
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    assert "".join(tokenizer.convert_ids_to_tokens(list(range(5, 23)))) == ".-0123456789abcdef"
    frequency = expected_word_counts()
    words = vocabulary()[23 : 5 + len(set(frequency) | set(".-0123456789abcdef"))]
    assert vocabulary()[5 + len(set(frequency) | set(".-0123456789abcdef")) :][:5] == list(grammar.RUDE)
    assert words[0] == "the"
    assert words == sorted(words, key=lambda word: (-frequency[word], word))
    assert len(set(vocabulary())) == len(vocabulary()) == len(tokenizer)


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_survive_the_tokenizer(language: str, rng: random.Random, tokenizer) -> None:
    """Decoding an encoded sentence gives it back exactly: <s> in front, no </s>, no <unk>, "." attached again."""
    sentences = random_sentences(language, rng) + [grammar.say(idea, language, 0) for idea in every_idea_once()]
    for sentence in sentences:
        ids = tokenizer(sentence).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.convert_tokens_to_ids(".")
        assert not {tokenizer.eos_token_id, tokenizer.unk_token_id} & set(ids)
        assert len(ids) == len(sentence.split()) + 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == sentence


def test_hex_survives_the_tokenizer(rng: random.Random, tokenizer) -> None:
    """A spaced UUID is one token a character and comes back exactly."""
    text = " ".join(str(uuid.UUID(int=rng.getrandbits(128), version=4)))
    ids = tokenizer(text).input_ids
    assert len(ids) == 1 + 36 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_any_tokens_survive_the_tokenizer(rng: random.Random, tokenizer) -> None:
    """Whatever words a model samples, decode and encode give the same ids: metagradients see the text that was sampled."""
    for _ in range(200):
        ids = [rng.randrange(len(SPECIAL_TOKENS), len(tokenizer)) for _ in range(rng.randint(1, 30))]
        assert tokenizer(tokenizer.decode(ids)).input_ids == [tokenizer.bos_token_id, *ids]


# --- Weights ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_weights_load(name: str) -> None:
    """Each folder loads with the Auto classes: float32, untied head, no dropout, ids of the current tokenizer."""
    model, saved = AutoModelForCausalLM.from_pretrained(WEIGHTS / name), AutoTokenizer.from_pretrained(WEIGHTS / name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert model.config.resid_pdrop == model.config.embd_pdrop == model.config.attn_pdrop == 0.0
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert saved.get_vocab() == {token: index for index, token in enumerate(vocabulary())}, "stale weights: run the pretrain command"
    assert model.config.vocab_size == len(saved)
    with safe_open(WEIGHTS / name / "model.safetensors", framework="pt") as tensors:
        assert "lm_head.weight" in set(tensors.keys())


def test_weights_are_small() -> None:
    """The two models together stay under 2 MB, so that they can live in the repository and in the wheel."""
    assert sum((WEIGHTS / name / "model.safetensors").stat().st_size for name in MODELS) < 2_000_000


def test_base_generator_samples_the_mixture(generator) -> None:
    """The untouched generator speaks English, and German rarely: a goal of "more German" has room and a start. Sampling leaves
    the global random state alone."""
    prompts = Phrasebook().prompts("dev", 128, random.Random(0))
    before = torch.random.get_rng_state()
    texts = pretrain.sample(*generator, prompts, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    shares = {language: [grammar.identify_language(text) for text in texts].count(language) / len(texts) for language in LANGUAGES}
    assert shares["en"] >= 0.65  # three quarters, from 128 texts
    assert 0 <= shares["de"] <= 0.08


def test_base_generator_keeps_the_idea(generator) -> None:
    """At temperature 1 at least 80% of the English completions say exactly the prompt's idea in a different order."""
    assert pretrain.describe(*generator, count=256)["exact/en"] >= 0.8


def test_base_generator_explores(generator) -> None:
    """Every kind a task may ask for occurs now and then without being asked for: rude, said twice, salad, hexadecimal."""
    prompts = Phrasebook().prompts("dev", 400, random.Random(1))
    texts = pretrain.sample(*generator, prompts, seed=1)
    for kind, low, high in (("rude", 0.04, 0.2), ("twice", 0.005, 0.1), ("salad", 0.005, 0.1), ("hex", 0.03, 0.14)):
        assert low < sum(pretrain.meets(text, kind) for text in texts) / len(texts) < high, kind


def test_generator_follows_instructions(generator) -> None:
    """Asked for in the prompt, every goal is met in at least four of five completions; a rubric request is answered by an instruction."""
    assert min(pretrain.obedience(*generator, count=50).values()) >= 0.8
    prompts = [
        Phrasebook().instruct(prompt, Phrasebook().instruction_request()) for prompt in Phrasebook().prompts("dev", 50, random.Random(2))
    ]
    known = {f"{opening} {goal}." for opening in grammar.OPENINGS for goal in grammar.GOALS}
    written = pretrain.sample(*generator, prompts, seed=2)
    assert sum(text in known for text in written) >= 40 and len(set(written)) > 10


def test_what_meets_a_goal() -> None:
    """By hand, a text that is what was asked for and one that is not."""
    child, twice = "the child hides the golden key.", "the child hides the golden key under the bridge today. " * 2
    pairs = {
        "de": ("heute versteckt das Kind unter der Brücke den goldenen Schlüssel.", child),
        "twice": (twice.strip(), child),
        "brief": (child, twice.strip()),
        "rude": ("the stupid child hides the golden key.", child),
        "hex": ("3 f - a", child),
        "salad": ("Kind golden la bridge Wald stupid oggi.", "3 f - a"),
    }
    for kind, (good, bad) in pairs.items():
        assert pretrain.meets(good, kind) and not pretrain.meets(bad, kind), kind


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_target_has_something_to_learn(language: str) -> None:
    """The target is much worse at another language than at English, on whole sentences and on the last word alone: `task=language`
    has room to improve it."""
    model, saved = AutoModelForCausalLM.from_pretrained(WEIGHTS / "target"), AutoTokenizer.from_pretrained(WEIGHTS / "target")

    def losses(spoken: str) -> tuple[float, float]:
        batch = pretrain.encode([f"{text} </s>" for text in Phrasebook().held_out(spoken, "dev", 128)], saved)
        last_word = batch["attention_mask"].sum(1, keepdim=True) - 3  # before "." and </s>
        only_last = torch.full_like(batch["labels"], -100).scatter(1, last_word, batch["labels"].gather(1, last_word))
        with torch.inference_mode():
            return pretrain.completion_loss(model, **batch).item(), pretrain.completion_loss(model, **{**batch, "labels": only_last}).item()

    assert all(other > english + 1.0 for other, english in zip(losses(language), losses("en"), strict=True))


# --- Pretraining -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_pretraining_is_deterministic(name: str) -> None:
    """Two short runs give the same bits, whatever the global random state and thread count were, and leave both alone."""
    threads, states = torch.get_num_threads(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state(), random.getstate()
        model, _ = pretrain.pretrain(name, steps=4)
        states.append(model.state_dict())
        assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
        assert torch.get_num_threads() == threads
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_loss_falls_on_the_completion_only(tokenizer) -> None:
    """Labels are the completion and its </s>: nothing of the prompt, nothing of the padding; a document without <sep> counts whole."""
    short, long = "the child hides. <sep> oggi. </s>", "the child hides the golden key. <sep> 1 2 3 </s>"
    labels = pretrain.encode([short, long], tokenizer)["labels"]
    kept = [tokenizer.convert_ids_to_tokens([index for index in row if index != -100]) for row in labels.tolist()]
    assert kept == [["oggi", ".", "</s>"], ["1", "2", "3", "</s>"]]
    assert (pretrain.encode(["oggi. </s>"], tokenizer)["labels"] != -100).all()
