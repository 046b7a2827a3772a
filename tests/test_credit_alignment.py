"""The credit of the target's tokens is paid to the tokens that the generator wrote, and nothing is lost on the way."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpgbench.bench.token_credit import in_generated_tokens
from dpgbench.worlds.world import encode


def bytes_tokenizer(*merges: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these merges ("t h" makes "th"): what real models have, and others with other merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split()) for merge in merges]
    tokens = ["<end>", *alphabet, *("".join(pair) for pair in pairs)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(dict.fromkeys(tokens))}, pairs))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def generator_of(tokenizer, places=20, width=5):
    torch.manual_seed(0)
    table = torch.nn.Embedding(len(tokenizer), width)
    return SimpleNamespace(
        tokenizer=tokenizer,
        ends=[tokenizer.eos_token_id],
        max_completion_tokens=places,
        model=SimpleNamespace(get_input_embeddings=lambda: table),
    )


def paid(writer, reader, ids, length, credit=None):
    """What each generated token gets of 1, 2, 3, ... for the target's tokens, and the target's tokens."""
    text = writer.decode(ids[:-1] if ids[-1] == writer.eos_token_id else ids, skip_special_tokens=True)
    labels = (encode(reader, [text], length)["labels"] != -100).double()
    credit = torch.arange(1.0, length + 1)[None] * labels if credit is None else credit
    result = in_generated_tokens(credit, [text], [ids], generator_of(writer), reader)
    assert result.sum() == credit.sum() and result.dtype == torch.float64
    return result[0].tolist(), reader.convert_ids_to_tokens(reader(text)["input_ids"])


LETTERS = bytes_tokenizer()
WORDS = bytes_tokenizer("t h", "th e", "c a", "ca t", "Ġ cat")


def test_the_same_tokens_keep_their_credit():
    ids = WORDS("the cat the")["input_ids"]
    assert paid(WORDS, WORDS, [*ids, 0], 9)[0] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert paid(WORDS, WORDS, ids, 9)[0] == [1.0, 2.0, 3.0, 4.0 + 5.0], "cut without an end: the last token has the end's"


def test_a_wider_token_is_paid_to_the_letter_it_ends_in():
    """The generator writes letters: "the" is t, h, e, and " cat" four more; the end is the end's."""
    ids = LETTERS("the cat")["input_ids"]
    amounts, read = paid(LETTERS, WORDS, [*ids, 0], 6)
    assert read == ["the", "Ġcat"] and amounts == [0, 0, 1.0, 0, 0, 0, 2.0, 3.0]


def test_narrower_tokens_are_paid_to_the_word_they_are_in():
    amounts, read = paid(WORDS, LETTERS, [*WORDS("the cat")["input_ids"], 0], 12)
    assert len(read) == 7 and amounts == [1.0 + 2 + 3, 4.0 + 5 + 6 + 7, 8.0]


def test_tokens_that_straddle():
    """t, he where "the" is read: as no tokenizer would spell it; and half of a token's characters are not enough."""
    other = bytes_tokenizer("h e")
    (t,), (he,) = other("t")["input_ids"], other("he")["input_ids"]
    assert paid(other, WORDS, [t, he, 0], 5)[0] == [0, 1.0, 2.0]
    letters = WORDS("c")["input_ids"] + WORDS("a")["input_ids"] + WORDS("t")["input_ids"]
    assert WORDS(WORDS.decode(letters))["input_ids"] != letters, "written as it would not be read"
    assert paid(WORDS, WORDS, [*letters, 0], 5)[0] == [0, 0, 1.0, 2.0]
    assert paid(WORDS, LETTERS, [*letters, 0], 5)[0] == [1.0, 2.0, 3.0, 4.0]


def test_bytes_of_one_character_are_settled_by_the_last():
    """Two bytes make one é: before the second nothing is said."""
    assert paid(LETTERS, LETTERS, [*LETTERS("aéb")["input_ids"], 0], 8)[0] == [1.0, 0, 2.0 + 3.0, 4.0, 5.0]
    odd = [*LETTERS("a")["input_ids"], *LETTERS("é")["input_ids"][:1]]  # a byte alone, which is read as another character
    amounts, _ = paid(LETTERS, LETTERS, odd, 8)
    assert amounts[0] == 1.0 and amounts[1] > 0


def test_beyond_the_targets_context_nothing_was_earned():
    """L = 3 keeps two words and a part of the rest, and no end."""
    ids = WORDS("the cat the cat")["input_ids"]
    assert paid(WORDS, WORDS, [*ids, 0], 3)[0] == [1.0, 2.0, 3.0, 0, 0, 0]


def test_empty_texts_and_special_tokens():
    assert paid(WORDS, WORDS, [0], 4)[0] == [1.0]
    silent = bytes_tokenizer("t h")
    silent.add_special_tokens({"additional_special_tokens": ["<quiet>"]})
    quiet = silent.convert_tokens_to_ids("<quiet>")
    (th,) = silent("th")["input_ids"]
    assert paid(silent, silent, [quiet, th, quiet, 0], 5)[0] == [0, 1.0, 0, 2.0]


def test_a_tokenizer_without_offsets_pays_whole_texts():
    class Slow:
        is_fast, eos_token_id, pad_token_id = False, 0, 0

        def __call__(self, texts, **options):
            assert not options.get("return_offsets_mapping")
            return {"input_ids": WORDS(texts)["input_ids"]}

        def convert_ids_to_tokens(self, ids):
            return ids

    texts, ids = ["the cat", "the"], [[*WORDS(text)["input_ids"], 0] for text in ("the cat", "the")]
    credit = torch.arange(8.0).view(2, 4)
    assert in_generated_tokens(credit, texts, ids, generator_of(WORDS), Slow()).tolist() == [[0, 0, 6.0], [0, 22.0, 0]]


def test_the_phrasebooks_tokens_keep_their_credit(bench):
    """Its target adds <s> in front, which earns nothing: the credit of word t is column t + 1; a text that was cut has no end, whose
    credit its last word gets. Sums are each text's metagradient."""
    work = bench("task=language", "method=dpg")
    asked = work.generator.token_ids(work.prompts(16, "a test"))
    torch.manual_seed(0)
    ids = work.generator.write(asked)
    texts = work.generator.texts_of(ids)
    credit = work.metagradients(texts, 0, per_token=True).rewards.double()
    result = in_generated_tokens(credit, texts, ids, work.generator, work.world.target_tokenizer)
    whole = work.metagradients(texts, 0).rewards.double()
    assert torch.allclose(result.sum(1), credit.sum(1), rtol=1e-13, atol=0)
    assert float((result.sum(1) - whole).abs().max() / whole.abs().max()) < 1e-4  # float32
    cut = [tokens[-1] != work.generator.tokenizer.eos_token_id for tokens in ids]
    assert 0 < sum(cut) < len(cut)
    for row, tokens in enumerate(ids):
        of_words = credit[row, 1 : len(tokens) + 1].clone()
        of_words[-1] += credit[row, len(tokens) + 1] if cut[row] else 0.0
        assert torch.equal(result[row, : len(tokens)], of_words) and not result[row, len(tokens) :].any()
