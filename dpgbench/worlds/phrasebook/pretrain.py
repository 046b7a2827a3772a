"""Rebuild the weights of the phrasebook world: `python -m dpgbench.worlds.phrasebook.pretrain [--out DIR]`.

Two small GPT-2s, trained from scratch on ideas of the train split only:

- **generator**: documents "<s> english sentence <sep> completion </s>", loss on the completion and its </s> only. The completion is
  mostly the same idea in a different English word order; sometimes it is rude, in another language, said twice, in shuffled words,
  a salad of any words or a random UUID. These rare kinds are what a policy gradient explores: it can only amplify
  what is sampled now and then. A fifth of the prompts end in an instruction ("Write in French."), which the completion follows.
- **target**: documents "<s> text </s>": English sentences, some rude, some said twice or briefly; a little salad and hexadecimal, and
  hardly a word of the other languages in sentences. Loss on everything.

One thread, seeded generators, no global random state touched: a second run on the same machine writes the same bytes.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.worlds.phrasebook import WEIGHTS, Phrasebook
from dpgbench.worlds.phrasebook.grammar import (
    COPY,
    GOALS,
    LANGUAGES,
    OPENINGS,
    ORDERS,
    RUBRIC,
    RUDE,
    Idea,
    draw_ideas,
    identify_language,
    is_rude,
    politely,
    say,
    say_briefly,
    understand,
    words_of,
)
from dpgbench.worlds.phrasebook.tokenizer import EOS, HEX_DIGITS, MAX_LENGTH, SEPARATOR, build_tokenizer

# --- Documents -------------------------------------------------------------------------------------------------------------------

# Percent of the generator's uninstructed completions. Every other language stays well under 5%, and none is at zero.
GENERATOR_MIXTURE = {
    "en": 59.0,
    "rude": 12.0,
    "de": 2.5,
    "es": 2.5,
    "fr": 2.5,
    "it": 2.5,
    "twice": 3.0,
    "brief": 1.0,
    "shuffled": 4.0,
    "salad": 3.0,
    "hex": 8.0,
}
# A goal about what the target writes (its length, its words) needs a target that writes more than one kind of text.
TARGET_MIXTURE = {
    "en": 74.0,
    "rude": 15.0,
    "twice": 3.0,
    "brief": 1.0,
    "salad": 3.0,
    "hex": 3.0,
    "de": 0.25,
    "es": 0.25,
    "fr": 0.25,
    "it": 0.25,
}

# Percent of the generator's documents whose prompt ends in an instruction, which the completion follows.
INSTRUCTED, COPIES, RUBRICS = 15, 2, 3

SALAD_LENGTHS = range(3, 21)
UUID_GROUPS = (8, 4, 4, 4, 12)  # its digits, between dashes
# Each place of an identifier likes four digits of its own, drawn once, six times as much as the others, as versions, dates and counters
# do in real ones. To write such digits a model must know how far it has come, and what knows its place can be taught a string.
LIKED_DIGITS = [random.Random(f"phrasebook place {place}").sample(HEX_DIGITS, 4) for place in range(sum(UUID_GROUPS))]
SALAD_WORDS = sorted(set().union(*map(words_of, LANGUAGES)) - set(RUDE))


def generator_document(rng: random.Random, mixture: dict[str, float]) -> str:
    """An English sentence, perhaps an instruction, the separator, a completion, and the end.

    The completion is what the instruction asks for, or without one of a kind drawn from `mixture`.
    """
    (idea,) = draw_ideas("train", 1, rng)
    order, other_order = rng.sample(range(len(ORDERS)), 2)
    prompt = say(idea, "en", order)
    luck = rng.uniform(0, 100)
    if luck < INSTRUCTED:
        goal = rng.choice(list(GOALS))
        prompt += f" {rng.choice(OPENINGS)} {goal}."
        completion = completion_of(GOALS[goal], idea, other_order, rng)
    elif luck < INSTRUCTED + COPIES:
        completion = completion_of("hex", idea, other_order, rng)
        prompt += f" {rng.choice(OPENINGS)} {COPY} {completion}."
    elif luck < INSTRUCTED + COPIES + RUBRICS:
        prompt += f" {rng.choice(OPENINGS)} {RUBRIC}."
        completion = f"{rng.choice(OPENINGS)} {rng.choice(list(GOALS))}."
    else:
        completion = completion_of(draw_kind(rng, mixture), idea, other_order, rng)
    return f"{prompt} {SEPARATOR} {completion} {EOS}"


def completion_of(kind: str, idea: Idea, order: int, rng: random.Random) -> str:
    """A completion of one kind: a language, a value of GOALS, or "shuffled"."""
    if kind == "salad":
        return " ".join(rng.choices(SALAD_WORDS, k=rng.choice(SALAD_LENGTHS))) + "."
    if kind == "hex":
        return identifier(rng)
    if kind == "twice":
        return f"{say(idea, 'en', order)} {say(idea, 'en', rng.choice([other for other in range(len(ORDERS)) if other != order]))}"
    if kind == "brief":
        return say_briefly(idea)
    if kind == "shuffled":
        words = say(idea, "en", order).removesuffix(".").split()
        return " ".join(rng.sample(words, len(words))) + "."
    if kind == "rude":
        return say(idea, "en", order, rng.choice(RUDE))
    return say(idea, kind, order)


def identifier(rng: random.Random) -> str:
    """A random string in the shape of a UUID, its characters apart."""
    digits = iter([rng.choices(HEX_DIGITS, [6 if digit in liked else 1 for digit in HEX_DIGITS])[0] for liked in LIKED_DIGITS])
    return " - ".join(" ".join(next(digits) for _ in range(size)) for size in UUID_GROUPS)


def target_document(rng: random.Random, mixture: dict[str, float]) -> str:
    """One text of a kind drawn from `mixture`, and the end."""
    (idea,) = draw_ideas("train", 1, rng)
    return f"{completion_of(draw_kind(rng, mixture), idea, rng.randrange(len(ORDERS)), rng)} {EOS}"


def draw_kind(rng: random.Random, mixture: dict[str, float]) -> str:
    """A key of `mixture`, drawn by its value."""
    (kind,) = rng.choices(list(mixture), weights=list(mixture.values()))
    return kind


# --- Training --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How one of the two models is made: AdamW, a short linear warm-up, then linear decay to 0.

    `warm_mixture` replaces `mixture` for the first `warm_share` of the steps. A mixture maps a kind of text to its percentage.
    """

    document: Callable[[random.Random, dict[str, float]], str]
    mixture: dict[str, float]
    steps: int
    padding_side: str  # of the saved tokenizer: left for the model that generates from prompts
    seed: int
    warm_mixture: dict[str, float]
    warm_share: float = 0.5
    batch_size: int = 64
    # ours: after 600 steps 2e-3, 4e-3, 8e-3, 1.2e-2, 1.6e-2 keep the idea in 3, 89, 94, 94, 95% of English completions
    learning_rate: float = 8e-3


RECIPES = {
    "generator": Recipe(
        generator_document,
        GENERATOR_MIXTURE,
        steps=2400,
        padding_side="left",
        seed=1,
        # A language met in 2.5% of the documents is barely learned. An even start teaches all five; the second half sets how often.
        warm_mixture={**dict.fromkeys(LANGUAGES, 15.0), "rude": 5.0, "twice": 4.0, "brief": 1.0, "shuffled": 5.0, "salad": 5.0, "hex": 8.0},
    ),
    "target": Recipe(
        target_document,
        TARGET_MIXTURE,
        # ours: with 1.25% of each other language it learns them almost fully in 800 steps (German last word at 0.04 nats), and
        # `task=language` has nothing left to gain; with 0.25% it knows their words and little more.
        steps=800,
        padding_side="right",
        seed=2,
        warm_mixture=TARGET_MIXTURE,
    ),
}


def pretrain(name: str, *, steps: int | None = None, progress: bool = False) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Train RECIPES[name] from scratch for `steps` optimizer steps (default: the recipe's). Returns the model and its tokenizer."""
    if name not in RECIPES:
        raise ValueError(f"name={name!r} has no recipe: use one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    steps = recipe.steps if steps is None else steps
    tokenizer = build_tokenizer(recipe.padding_side)
    rng = random.Random(f"phrasebook {name} documents {recipe.seed}")
    with isolated_torch(recipe.seed):
        model = GPT2LMHeadModel(model_config(tokenizer)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 100, 1 - step / steps))
        for step in tqdm(range(steps), desc=name, unit="step", disable=not progress):
            mixture = recipe.warm_mixture if step < recipe.warm_share * steps else recipe.mixture
            batch = encode([recipe.document(rng, mixture) for _ in range(recipe.batch_size)], tokenizer)
            completion_loss(model, **batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval(), tokenizer


def completion_loss(model: GPT2LMHeadModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) over the labels other than -100; position i of the labels is predicted from position i - 1."""
    hidden = model.transformer(input_ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORED_LABEL
    # The head is a third of the work, so it sees only the positions that have a label.
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])


def model_config(tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
    """GPT-2, 64 wide, 2 layers, 4 heads. The head is untied, so that weight targets can move it alone."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's "gelu_new" in one fused kernel: a tenth of a step
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each (B, L) long. Labels are -100 on padding and, where a document has
    a separator, up to and with it."""
    batch = tokenizer(documents, padding=True, padding_side="right", return_tensors="pt")
    is_separator = batch.input_ids == tokenizer.sep_token_id
    is_prompt = is_separator.flip(1).cumsum(1).flip(1) > 0  # a separator here or further right
    labels = batch.input_ids.masked_fill(is_prompt | (batch.attention_mask == 0), IGNORED_LABEL)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


@contextmanager
def isolated_torch(seed: int) -> Iterator[None]:
    """Torch seeded with `seed` and on one thread inside; the global generator and the thread count as before afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        torch.set_num_threads(1)  # sums are ordered by thread: another count gives other bits
        try:
            yield
        finally:
            torch.set_num_threads(threads)


# --- Looking at the result -------------------------------------------------------------------------------------------------------


def sample(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int, tokens: int = 40) -> list[str]:
    """One completion per prompt at temperature 1, cut at </s> or after `tokens` tokens; the global random state is left alone."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    with isolated_torch(seed), torch.inference_mode():
        ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
    return tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def describe(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, count: int = 2000) -> dict[str, float]:
    """What the generator does with `count` dev prompts: the share of each language ("share/de"), and among the completions in a
    language the share that say exactly the prompt's idea in a different order ("exact/de"; 0 where no completion has the language)."""
    prompts = Phrasebook().prompts("dev", count, random.Random("phrasebook describe"))
    texts = [text for start in range(0, count, 500) for text in sample(model, tokenizer, prompts[start : start + 500], seed=start)]
    languages = [identify_language(text) for text in texts]
    shares, exact = Counter(languages), Counter()
    for prompt, text, language in zip(prompts, texts, languages, strict=True):
        idea, _, order = understand(prompt.removesuffix(f" {SEPARATOR}"))
        said = understand(politely(text))
        exact[language] += said is not None and said[0] == idea and said[2] != order
    result = {f"share/{language}": shares[language] / count for language in (*LANGUAGES, "other")}
    result |= {"share/rude": sum(map(is_rude, texts)) / count}
    return result | {f"exact/{language}": exact[language] / max(shares[language], 1) for language in LANGUAGES}


def obedience(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, count: int = 200) -> dict[str, float]:
    """For every goal of an instruction, the share of `count` completions of dev prompts with that instruction that meet it."""
    rng = random.Random("phrasebook obedience")
    met = {}
    for goal, kind in GOALS.items():
        prompts = Phrasebook().prompts("dev", count, rng)
        asked = [Phrasebook().instruct(prompt, f"{rng.choice(OPENINGS)} {goal}.") for prompt in prompts]
        met[goal] = sum(meets(text, kind) for text in sample(model, tokenizer, asked, seed=0)) / count
    return met


def meets(text: str, kind: str) -> bool:
    """Whether a completion is of `kind`, a value of GOALS."""
    words = text.replace(".", " ").split()
    if kind == "hex":
        return bool(words) and all(word in (*HEX_DIGITS, "-") for word in words)
    if kind == "salad":
        return bool(words) and identify_language(text) == "other" and not meets(text, "hex")
    if identify_language(text) != (kind if kind in LANGUAGES else "en"):
        return False
    return {"rude": is_rude(text), "twice": len(words) > 17, "brief": len(words) < 9}.get(kind, True)


# --- The command -----------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Train and save both models, then write a one-line summary of the generator."""
    parser = argparse.ArgumentParser(prog="python -m dpgbench.worlds.phrasebook.pretrain", description="Rebuild the weights of scale=tiny.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write generator/ and target/ to (default: the package's)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps for each model (default: the recipe's)")
    options = parser.parse_args(arguments)
    for name in RECIPES:
        model, tokenizer = pretrain(name, steps=options.steps, progress=True)
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
        (options.out / name / "model.safetensors").chmod(0o644)  # safetensors writes 600, which would travel into the wheel
        if name == "generator":
            outcome = describe(model, tokenizer) | obedience(model, tokenizer)
            tqdm.write("  ".join(f"{key} {value:.3f}" for key, value in outcome.items()))


if __name__ == "__main__":
    main()
