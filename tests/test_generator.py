"""One sampler, one distribution: what a checkpoint brings along does not come between rollouts, updates and deployment."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import contextmanager

import pytest
import torch
from architectures import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM

from dpgbench import config
from dpgbench.bench.grpo import _Trainer, train_policy
from dpgbench.bench.sft import pairs
from dpgbench.core.errors import UserError
from dpgbench.task_support.score_function import sample
from dpgbench.worlds import decoding
from dpgbench.worlds.generator import ends_of
from dpgbench.worlds.models import load_generator, load_target, without_noise
from dpgbench.worlds.phrasebook import WEIGHTS, Phrasebook
from dpgbench.worlds.world import encode

VOCABULARY = json.loads((WEIGHTS / "generator" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
BOS, EOS, STOP = VOCABULARY["<s>"], VOCABULARY["</s>"], VOCABULARY["."]

# What checkpoints set, each at a value that shows: transformers' generate reads them all.
HABITS = {
    "temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.3, "typical_p": 0.3, "epsilon_cutoff": 0.2, "eta_cutoff": 0.2,
    "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[STOP]], "suppress_tokens": [STOP],
    "begin_suppress_tokens": [VOCABULARY["the"]], "min_new_tokens": 15, "exponential_decay_length_penalty": [3, 1.5],
    "forced_bos_token_id": VOCABULARY["a"], "forced_eos_token_id": VOCABULARY["a"], "num_beams": 2, "guidance_scale": 3.0,
    "do_sample": False, "max_length": 5,
}  # fmt: skip

CHAT = "{% for m in messages %}<s> {{ m['content'] }} <sep> {% endfor %}"
TURNS = "{% for m in messages %}<s> {{ m['content'] }} {{ '.' if m['role'] == 'assistant' else '<sep>' }} {% endfor %}"


def variant(folder, *, role="generator", model=None, generation=None, tokenizer=None, before=(BOS,), after=()):
    """The embedded model in `folder` with settings changed; its tokenizer puts the tokens `before` and `after` around a text."""
    shutil.copytree(WEIGHTS / role, folder)
    for name, more in (("config", model), ("generation_config", generation), ("tokenizer_config", tokenizer)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **(more or {})}))
    path, names = folder / "tokenizer.json", {BOS: "<s>", EOS: "</s>"}
    content = json.loads(path.read_text(encoding="utf-8"))
    content["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "single": [
            *({"SpecialToken": {"id": names[token], "type_id": 0}} for token in before), {"Sequence": {"id": "A", "type_id": 0}},
            *({"SpecialToken": {"id": names[token], "type_id": 0}} for token in after),
        ],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for token, name in names.items()},
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return folder


VARIANTS = {
    "plain": {},
    "dropout": {"model": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.3)},
    "two ends, one of them named by the generation config": {"generation": {"eos_token_id": [EOS, STOP], "_from_model_config": False}},
    "two ends, one of them named by the model's config": {"model": {"eos_token_id": STOP}},
    "every sampling habit": {"generation": {**HABITS, "_from_model_config": False}},
    "a tokenizer that begins no text": {"before": ()},
    "a tokenizer that ends every text": {"after": (EOS,)},
    "no token for padding": {"tokenizer": {"pad_token": None}},
    "padding is the end": {"tokenizer": {"pad_token": "</s>"}},
    "padding on the right": {"tokenizer": {"padding_side": "right"}},
    "chat template": {"tokenizer": {"chat_template": CHAT}},
    "chat template, padding on the right, which is the end": {
        "tokenizer": {"chat_template": CHAT, "padding_side": "right", "pad_token": "</s>"}
    },
    "chat template that ends turns in its own way": {
        "tokenizer": {"chat_template": TURNS, "padding_side": "right"}, "generation": {"eos_token_id": [STOP], "_from_model_config": False},
    },
}  # fmt: skip


def generator_of(folder):
    return load_generator(config.read([f"scale.generator={folder}", "method=base"], sweep=False).cells[0].spec.scale)


def questions(generator, count: int, rng: random.Random):
    """Sentences of many lengths, as messages where there is a template."""
    texts = [" ".join(text.split()[: 2 + number % 7]) for number, text in enumerate(Phrasebook().prompts("train", count, rng))]
    return [[{"role": "user", "content": text}] for text in texts] if generator.tokenizer.chat_template else texts


@contextmanager
def watched_draws(monkeypatch, forced=None):
    """Every column that is drawn while this is open, as (tokens, log-probabilities) of all rows; `forced` columns are drawn instead.

    A row that has left the batch has pads and zeros.
    """
    columns, draw = [], decoding.race

    def race(probabilities, here, rows):
        tokens = draw(probabilities, here, rows) if forced is None else forced[len(columns)][here]
        logps = probabilities.gather(1, tokens[:, None])[:, 0].log()
        columns.append((torch.zeros(rows, dtype=torch.long).index_copy(0, here, tokens), torch.zeros(rows).index_copy(0, here, logps)))
        return tokens

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "race", race)
        yield columns


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_rollout_has_one_probability(bench, monkeypatch, tmp_path, changes):
    """The log-probability of a rollout when it is drawn, in the update, under `Generator.sample`, and of the model alone on the unpadded
    text: the same number. And its text is the one that `Generator.sample` reads off it."""
    folder = variant(tmp_path / "model", **changes)
    work, asked, in_update = bench("steps=1", f"scale.generator={folder}"), [], {}
    generator = work.generator
    work.prompts = lambda count, *names: questions(generator, count, random.Random(0))
    score = _Trainer._get_per_token_logps_and_entropies

    def update(trainer, model, ids, mask, logits_to_keep, *args, **kwargs):
        result = score(trainer, model, ids, mask, logits_to_keep, *args, **kwargs)
        for row, kept, logps in zip(ids, mask.bool(), result[0].detach(), strict=True):
            prompt = tuple(row[:-logits_to_keep][kept[:-logits_to_keep]].tolist())
            written = kept[-logits_to_keep:]
            in_update[prompt, tuple(row[-logits_to_keep:][written].tolist())] = logps[written]
        return result

    def reward(rollouts):
        asked.append(rollouts)
        prompts, completions = generator.token_ids(rollouts.prompts), [[] for _ in rollouts.prompts]
        for tokens, _ in drawn:
            for row, token in enumerate(tokens.tolist()):
                if not completions[row] or completions[row][-1] not in generator.ends:
                    completions[row].append(token)
        with watched_draws(monkeypatch, forced=[tokens for tokens, _ in drawn]) as again:
            texts, _ = generator.sample(rollouts.prompts, seed=1)
        assert texts == rollouts.completions
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            with torch.no_grad():
                logits = generator.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            alone = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            ways = [torch.stack([logps[row] for _, logps in columns[: len(completion)]]) for columns in (drawn, again)]
            told.append((tuple(prompt), tuple(completion), alone, *ways))
        return [float(len(text)) for text in rollouts.completions]

    told: list = []
    monkeypatch.setattr(_Trainer, "_get_per_token_logps_and_entropies", update)
    with watched_draws(monkeypatch) as drawn:
        for _ in train_policy(work, reward):
            pass
    assert len(told) == 16 and len({len(prompt) for prompt, *_ in told}) > 1, "prompts of one length need no padding"
    assert any(completion[-1] in generator.ends for _, completion, *_ in told)
    for prompt, completion, alone, rollout, deployment in told:
        for logps in (rollout, deployment, in_update[prompt, completion]):
            assert torch.allclose(logps, alone, atol=2e-5), (logps, alone)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_prompts_are_padded_on_the_left_and_left_open(tmp_path, changes):
    """In every row the last token is the prompt's own last and the mask's last is a 1; what it reads does not depend on its neighbours."""
    generator = generator_of(variant(tmp_path / "model", **changes))
    prompts = questions(generator, 8, random.Random(1))
    batch = generator.tokenize(prompts)
    assert bool((batch["attention_mask"][:, -1] == 1).all()) and int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
    for prompt, ids, mask in zip(prompts, batch["input_ids"], batch["attention_mask"], strict=True):
        (alone,) = generator.token_ids([prompt])
        assert ids[mask.bool()].tolist() == alone and alone[-1] != EOS
        assert alone[-1] == (VOCABULARY["<sep>"] if generator.tokenizer.chat_template else generator.tokenizer(prompt)["input_ids"][-1])


@pytest.mark.parametrize("habit", HABITS)
def test_no_sampling_habit_of_a_checkpoint_changes_a_text(tmp_path, habit):
    """Temperature 1 from the full distribution, whatever generation_config.json says."""
    prompts = Phrasebook().prompts("train", 8, random.Random(2))
    plain, changed = (
        generator_of(variant(tmp_path / name, generation=generation)).sample(prompts, seed=3)[0]
        for name, generation in (("plain", None), ("changed", {habit: HABITS[habit], "_from_model_config": False}))
    )
    assert plain == changed


def test_a_tokenizer_that_ends_every_text_ends_an_example_once(tmp_path):
    """A target's example has one end; so has what a generator is fine-tuned on, and its prompt none."""
    variant(tmp_path / "target", role="target", after=(EOS,))
    _, tokenizer = load_target(config.read([f"scale.target={tmp_path / 'target'}"], sweep=False).cells[0].spec.scale)
    assert encode(tokenizer, ["the cat sleeps."], 12)["labels"][0].tolist().count(EOS) == 1
    generator = generator_of(variant(tmp_path / "generator", after=(EOS,)))
    inputs, labels = pairs(generator, ["the cat sleeps.", "the dog"], ["the dog.", "a cat sees a dog."])
    assert (labels == EOS).sum(1).tolist() == [1, 1] and (inputs["input_ids"] == EOS).sum(1).tolist() == [1, 1]


def test_a_generator_is_fine_tuned_on_the_end_that_its_turns_have(tmp_path):
    """The chat template's, which is not the tokenizer's."""
    generator = generator_of(variant(tmp_path / "model", **VARIANTS["chat template that ends turns in its own way"]))
    assert generator.tokenizer.eos_token_id == EOS and generator.own_end == STOP
    _, labels = pairs(generator, questions(generator, 1, random.Random(0)), ["the dog"])
    assert labels[0, -1] == STOP and EOS not in labels
    assert generator_of(variant(tmp_path / "other", tokenizer={"chat_template": CHAT})).own_end == EOS


def test_a_target_stops_at_each_of_its_ends(tmp_path):
    """Fresh texts of a target whose generation config names a second end: no text goes on behind it, and it is part of none."""
    variant(tmp_path / "target", role="target", generation={"eos_token_id": [EOS, STOP], "_from_model_config": False})
    target, tokenizer = load_target(config.read([f"scale.target={tmp_path / 'target'}"], sweep=False).cells[0].spec.scale)
    assert set(ends_of(target, tokenizer)) == {EOS, STOP}
    samples = sample(target, tokenizer, 32, 16, seed=0)
    assert not any("." in text for text in samples.texts)
    chosen = [row[row != -100].tolist() for row in samples.labels]
    assert sum(row[-1] == STOP for row in chosen) > 16 and not any(STOP in row[:-1] for row in chosen)


@pytest.mark.parametrize("settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_no_architecture_has_noise_in_training(settings, tmp_path):
    """In training mode as in evaluation, to the bit, where the configuration that was saved asks for noise everywhere."""
    torch.manual_seed(0)
    noisy = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    ids = torch.arange(12).view(2, 6)
    assert not torch.equal(noisy.train()(input_ids=ids).logits, noisy.eval()(input_ids=ids).logits), "the test would say nothing"
    noisy.save_pretrained(tmp_path)
    calm = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=without_noise(AutoConfig.from_pretrained(tmp_path)), attn_implementation="eager"
    )
    assert torch.equal(calm.train()(input_ids=ids).logits, calm.eval()(input_ids=ids).logits)


def test_a_bfloat16_generator_is_trained_in_float32(bench):
    """A step of 1e-6 is far below half of a bfloat16 spacing: the weights that are kept and deployed have felt it, and draw what the
    update sees."""
    work = bench("steps=2", "scale.generator_dtype=bfloat16", "policy.lr=1e-6")
    before = {name: value.float().clone() for name, value in work.generator.model.state_dict().items()}
    assert work.generator.model.dtype == torch.bfloat16
    for _ in train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions]):
        pass
    after = work.generator.model.state_dict()
    moved = sum(int((after[name] != value).sum()) for name, value in before.items()) / sum(value.numel() for value in before.values())
    assert work.generator.model.dtype == torch.float32 and moved > 0.5
    with work.generator.products():
        assert work.generator.model(input_ids=torch.tensor([[BOS, STOP]])).logits.dtype == torch.bfloat16


def test_a_tokenizer_that_cannot_be_kept_from_ending_texts_is_refused(tmp_path, monkeypatch):
    """One line that names the model."""
    folder = variant(tmp_path / "model", after=(EOS,))
    monkeypatch.setattr("dpgbench.worlds.models.TemplateProcessing", lambda **_: None)
    with pytest.raises(UserError, match="ends every text, prompts too"):
        generator_of(folder)


def test_warnings_about_generation_are_heard(bench, caplog, monkeypatch):
    """Loading and training are silent; a warning of transformers' generation is not."""
    import logging

    work = bench("steps=1")
    assert logging.getLogger("transformers.generation.utils").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("transformers.modeling_utils").isEnabledFor(logging.WARNING)
    assert work.sample(work.prompts(2, "x"), "x")
