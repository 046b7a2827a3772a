"""Draws and values that the points of a best-of-n curve share: the same texts and the same charges as without, and less work."""

from __future__ import annotations

import pytest
import torch

from dpgbench.bench import differentiating
from dpgbench.plugins.registry import Registry

COUNT = 12  # prompts; no multiple of the texts that are judged at once


def curve(work):
    """(step, texts, price) of each snapshot, as the harness takes them."""
    prompts, found = work.prompts(COUNT, "a test"), []
    for snapshot in Registry().load("method", "active_inheritance")(work.options).run(work):
        with work.meter.deployment() as price:
            texts = snapshot.sample(prompts)
        found.append((snapshot.step, texts, price))
    return found


def alone(work, n):
    """Best of n by a loop that shares nothing: texts and price."""
    prompts = work.prompts(COUNT, "a test")
    with work.meter.deployment() as price:
        draws = [work.sample(prompts, "deployment", *([draw] if draw else [])) for draw in range(n)]
        texts = [text for draw in draws for text in draw]
        scores = work.task.score(texts)
        values = work.one_step_utilities(texts) if scores is None else scores
    kept = [max((place + COUNT * draw for draw in range(n)), key=values.__getitem__) for place in range(COUNT)]
    return [texts[index] for index in kept], price


@pytest.mark.parametrize("task", ["language", pytest.param("l2_norm", marks=pytest.mark.slow)])
def test_every_point_is_what_it_is_alone_and_pays_for_itself(bench, task):
    """Texts, FLOPs and tokens to the last bit, by a black-box score and by utilities."""
    words = (f"task={task}", "method=active_inheritance", "n=5")
    found = curve(bench(*words))
    assert [step for step, *_ in found] == [1, 2, 4, 5]
    for n, texts, price in found:
        wanted, paid = alone(bench(*words), n)
        assert texts == wanted and price.flops == paid.flops
        assert (price.tokens_generated, price.tokens_trained) == (paid.tokens_generated, paid.tokens_trained)
        assert price.tokens_generated > 0 and (price.tokens_trained > 0) == (task == "l2_norm")


def test_a_curve_draws_and_scores_each_text_once(bench, monkeypatch):
    work = bench("task=language", "method=active_inheritance", "n=5")
    drawn, scored = [], []
    sample, score = work.generator.sample, work.task.score
    monkeypatch.setattr(work.generator, "sample", lambda *given: drawn.append(1) or sample(*given))
    work.task.score = lambda texts: scored.extend(texts) or score(texts)
    curve(work)
    assert len(drawn) == 5 and len(scored) == 5 * COUNT


def test_utilities_that_are_known_are_charged_and_not_computed_again(bench, monkeypatch):
    """The same bits as from one call, computed in the same groups: of six known values the first four make a whole group of four."""
    work = bench("task=l2_norm", "method=active_inheritance", "training.lr=1e-3")
    texts, computed = work.world.held_out("en", "dev", 10), []
    parts = work._differentiating
    monkeypatch.setattr(parts, "_texts_at_once", lambda: 4)
    whole, spent = work.one_step_utilities(texts), work.meter.flops["scoring"]
    known = work.one_step_utilities(texts[:6])
    inner = differentiating.one_step_values
    monkeypatch.setattr(differentiating, "one_step_values", lambda *given, **more: computed.append(len(given[1])) or inner(*given, **more))
    before = work.meter.flops["scoring"]
    assert work.one_step_utilities(texts, known=known) == whole and computed == [6]
    assert work.meter.flops["scoring"] - before == spent
    assert work.one_step_utilities(texts[:4], known=whole[:4]) == whole[:4] and computed == [6], "nothing left to compute"


def test_seconds_of_a_draw_are_charged_to_everyone_who_takes_it(bench):
    work = bench("task=language")
    prompts, draws = work.prompts(4, "a test"), work.shared_draws("a test")
    draws.first(1, prompts)
    draws._draws[0] = draws._draws[0]._replace(seconds=1000.0)
    with work.meter.deployment() as price:
        draws.first(2, prompts)
    assert 1000 <= price.seconds < 1100 and work.meter.seconds < 1000
    draws.first(2, prompts)
    assert 1000 <= work.meter.seconds < 1100


def test_other_prompts_or_weights_make_all_draws_anew(bench):
    work = bench("task=language")
    prompts, draws = work.prompts(6, "a test"), work.shared_draws("a test")
    first = draws.first(2, prompts)
    assert draws.first(2, prompts) == first and draws.first(1, prompts) == first[:1]
    others = work.prompts(6, "others")
    assert draws.first(1, others) == [work.sample(others, "a test")]
    with torch.no_grad():
        work.generator.model.lm_head.weight.mul_(0.0)
    assert draws.first(2, prompts) == [work.sample(prompts, "a test"), work.sample(prompts, "a test", 1)] != first
    optimizer = torch.optim.AdamW(work.generator.model.parameters(), lr=1e-2)
    work.generator.model(**work.generator.tokenize(prompts)).logits[..., ::2].mean().backward()
    stale = draws.first(1, prompts)
    optimizer.step()
    assert draws.first(1, prompts) == [work.sample(prompts, "a test")] != stale
