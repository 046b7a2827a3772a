"""Rewards for what a text looks like: each by hand, as what enters the policy's update, and as presets."""

from __future__ import annotations

import math

import pytest

from dpgbench import config
from dpgbench.bench import grpo
from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry

GERMAN, ENGLISH = "der Bauer findet den roten Apfel heute.", "the farmer finds the red apple today."


def paid(bench, monkeypatch, texts, *words):
    """What the method pays when the policy writes these four texts, and its bench."""
    inner = grpo._Loop.advantages_of

    def given(self, prompts, completion_ids, **rest):
        with monkeypatch.context() as patch:
            patch.setattr(self.generator, "texts_of", lambda completion_ids: texts)
            return inner(self, prompts, completion_ids, **rest)

    monkeypatch.setattr(grpo._Loop, "advantages_of", given)
    work = bench(*words, "completions=4", "steps=1", "inner_steps=1", "deployment_steps=null")
    list(Registry().load("method", "similarity")(work.options).run(work))
    return work.lines[0]["rollouts"]["rewards"], work


@pytest.mark.parametrize(
    ("words", "texts", "scores"),
    [
        # One of four characters differs; two are missing of four; the longer one counts; no character in common.
        (["task=uuid", "text=3fa0", "method=similarity"], ["3 f a 1", "3 f", "3 f a 0 0", "the"], [3 / 4, 2 / 4, 4 / 5, 0.0]),
        (["task=uuid", "text=3fa0", "method=levenshtein"], ["3 f a 1", "3 f", "3 f a 0 0", "the"], [3 / 4, 2 / 4, 4 / 5, 0.0]),
        (["task=language", "lang=de", "method=similarity"], [GERMAN, ENGLISH, "", "0 1"], [1.0, 0.0, 0.0, 0.0]),
        (["task=language", "lang=de", "method=langid"], [GERMAN, ENGLISH, "", "0 1"], [1.0, 0.0, 0.0, 0.0]),
        # The string is in no language; neither are digits and nothing.
        (["task=uuid", "text=3fa0", "method=langid"], [GERMAN, ENGLISH, "", "0 1"], [0.0, 0.0, 1.0, 1.0]),
    ],
)
def test_rewards_by_hand(bench, monkeypatch, words, texts, scores):
    found, work = paid(bench, monkeypatch, texts, *words)
    assert found == pytest.approx(scores)
    assert work.meter.flops["training"] == work.meter.flops["scoring"] == work.meter.flops["metagradient"] == 0


def test_the_nearest_reference_counts(bench):
    """By the definition of edit distance, against two references of four characters."""
    work = bench("task=language", "method=levenshtein")
    work.task.references = lambda: ["a b c d", "w x y z"]
    likeness = Registry().load("method", "similarity")(work.options)._levenshtein(work)
    assert likeness(["abcd", "w x y", "a x y z", ""]) == [1.0, 3 / 4, 3 / 4, 0.0]


def test_the_authors_forms_by_hand(bench, monkeypatch):
    """Over two references of four characters the mean of similarities; minus the mean of tokens that differ; and the share of words."""
    work = bench("task=language", "method=levenshtein", "over_references=mean")
    work.task.references = lambda: ["a b c d", "w x y z"]
    likeness = Registry().load("method", "similarity")(work.options)._levenshtein(work)
    assert likeness(["abcd", "w x", "", "w x c d"]) == [1 / 2, 1 / 4, 0.0, 1 / 2]
    texts, words = [GERMAN, "der Bauer findet", "", "the farmer"], ["task=language", "lang=de"]
    for how in ("max", "mean"):
        work = bench(*words, "method=levenshtein", "edit_distance=tokens", f"over_references={how}")
        work.task.references = lambda: ["der Bauer findet den roten Apfel heute.", "der Bauer"]
        found = Registry().load("method", "similarity")(work.options)._levenshtein(work)(texts)
        assert found == ([0, -1, -2, -2] if how == "max" else [-6 / 2, -(5 + 1) / 2, -(8 + 2) / 2, -(8 + 2) / 2])
    found, _ = paid(
        bench, monkeypatch, [GERMAN, "der Bauer the farmer", "", ENGLISH], *words, "method=langid", "language_score=probability"
    )
    assert found == [1.0, 0.5, 0.0, 0.0]
    near, mean = (
        Registry().load("method", "similarity")(work.options)._embedding(work)([GERMAN])
        for work in (bench(*words, "method=embedding"), bench(*words, "method=embedding", "over_references=mean"))
    )
    table = Registry().load("method", "similarity")(work.options)._embedded
    references = table(work, work.world.held_out("de", "dev", 64))
    assert mean.tolist() == pytest.approx((table(work, [GERMAN]) @ references.T).mean(1).tolist(), rel=1e-5) and mean < near


def test_embeddings_are_the_targets_own_by_hand(bench, monkeypatch):
    """The cosine of mean rows of phi_0's table, with the nearest reference; no tokens, no likeness; its products are charged."""
    texts = [GERMAN, ENGLISH, "", "Apfel"]
    found, work = paid(bench, monkeypatch, texts, "task=language", "lang=de", "method=embedding")
    table, tokenizer = work.world.target.transformer.wte.weight.detach().tolist(), work.world.target_tokenizer

    def mean(text):
        rows = [table[token] for token in tokenizer(text)["input_ids"][1:]]  # without <s>
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def cosine(one, other):
        return sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)

    references = [mean(text) for text in work.world.held_out("de", "dev", 64)]
    by_hand = [max(cosine(mean(text), reference) for reference in references) if text else 0.0 for text in texts]
    assert found == pytest.approx(by_hand, abs=1e-5) and found[0] > 0.6 > found[1]
    assert work.meter.flops["scoring"] == 2 * 4 * 64 * 64


@pytest.mark.parametrize("reward", ["levenshtein", "embedding", "langid"])
def test_the_baselines_are_presets(reward):
    (cell,) = config.read(["task=language", f"method={reward}"], sweep=False).cells
    assert cell.skip is None and cell.spec.method.name == "similarity" and cell.spec.method.label == cell.spec.method.reward == reward
    (cell,) = config.read(["task=sixseven", f"method={reward}"], sweep=False).cells
    assert cell.skip == "sixseven has no references, texts that show what is wanted"


@pytest.mark.slow
def test_the_policy_becomes_like_the_references(bench):
    """Ten steps of paying for embeddings near those of German sentences bring texts that are nearer."""
    words = ["task=language", "lang=de", "completions=128", "group_size=16", "steps=10", "policy.lr=2e-3", "scale_advantages=batch"]
    work = bench(*words, "method=embedding")
    list(Registry().load("method", "similarity")(work.options).run(work))
    likeness = [line["reward_mean"] for line in work.lines]
    assert sum(likeness[-2:]) / 2 > sum(likeness[:2]) / 2 + 0.15


def test_what_cannot_be_paid_is_said(bench):
    with pytest.raises(UserError, match=r"method\.reward=bleu: no such reward; choose from: embedding, langid, levenshtein, score"):
        config.read(["method=similarity", "reward=bleu"], sweep=False)
    (cell,) = config.read(["task=sixseven", "method=similarity"], sweep=False).cells
    assert cell.skip == "sixseven has no black-box score of a text"
    with pytest.raises(UserError, match=r"method\.edit_distance=characters: no such edit distance; choose from: relative, tokens"):
        config.read(["method=levenshtein", "edit_distance=characters"], sweep=False)
    work = bench("task=uuid", "method=langid", "language_score=probability", "deployment_steps=null", "inner_steps=1")
    with pytest.raises(UserError, match="language_score=probability: the references are in no language; write language_score=identified"):
        next(Registry().load("method", "similarity")(work.options).run(work))
    work = bench("task=language", "method=langid")
    work.task.references = lambda: None
    with pytest.raises(UserError, match="task=language: no references with these options"):
        next(Registry().load("method", "similarity")(work.options).run(work))
