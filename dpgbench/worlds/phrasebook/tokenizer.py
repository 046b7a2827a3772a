"""The word-level tokenizer of the phrasebook: a sentence is a dozen tokens, a spaced UUID thirty-six.

Ids, in this order:

    0..4    <pad> <s> </s> <sep> <unk>   (special: `decode(..., skip_special_tokens=True)` drops them)
    5..22   . - 0 1 ... 9 a ... f        (hexadecimal strings are written with spaces: "3 f - a 0"; the English "a" is the digit)
    23..    the words of all languages, by falling frequency in the generator's English-heavy text, then alphabetically
    last    the rude words, then those that only instructions have

So **a low id is a frequent token**. Weight targets paint their picture into the first rows and columns of the language-model head,
one column a token, and a picture on tokens that occur in almost every sentence gets a gradient from almost every sentence.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpgbench.worlds.phrasebook.grammar import LANGUAGES, RUDE, instruction_words, phrases

PAD, BOS, EOS, SEPARATOR, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<sep>", "<unk>")
PUNCTUATION = (".", "-")
HEX_DIGITS = tuple("0123456789abcdef")

# How often each language is spoken, in percent. `pretrain` mixes the generator's uninstructed documents by about these numbers.
LANGUAGE_PERCENT = {"en": Fraction(84), "de": Fraction(5, 2), "es": Fraction(5, 2), "fr": Fraction(5, 2), "it": Fraction(5, 2)}

MAX_LENGTH = 96  # positions of the models: the longest document, a UUID asked for and given, needs 94


def vocabulary() -> list[str]:
    """All tokens; a token's index is its id."""
    fixed = [*SPECIAL_TOKENS, *PUNCTUATION, *HEX_DIGITS]
    frequency = expected_word_counts()
    words = sorted(set(frequency) - set(fixed), key=lambda word: (-frequency[word], word))
    return list(dict.fromkeys([*fixed, *words, *RUDE, *instruction_words()]))


def expected_word_counts() -> Counter[str]:
    """Exact expected occurrences of each word in a hundred sentences that speak languages by LANGUAGE_PERCENT, phrases uniformly."""
    counts: Counter[str] = Counter()
    for language in LANGUAGES:
        for choices in phrases(language).values():
            for phrase in choices:
                for word in phrase.split():
                    counts[word] += LANGUAGE_PERCENT[language] / len(choices)  # a Fraction: ties must not hang on rounding
    return counts


def build_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """The tokenizer, built from the tables alone. Adds <s> in front and no </s>; a text of the phrasebook survives encode + decode."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(".", "isolated")])
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    # The WordPiece decoder is the one that puts a space before every token but the first (no token starts with "##").
    backend.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Replace(" .", ".")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        sep_token=SEPARATOR,
        unk_token=UNKNOWN,
        padding_side=padding_side,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
