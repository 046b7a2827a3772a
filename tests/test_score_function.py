"""The score-function surrogate against exact gradients on a target whose texts can all be listed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpgbench.api import Options
from dpgbench.core.errors import UserError
from dpgbench.metagrad.training import loaded
from dpgbench.task_support.score_function import (
    RATIO_LIMIT,
    Remembered,
    Samples,
    ScoreFunction,
    Surrogate,
    leave_one_out,
    log_probabilities,
    sample,
    text_weights,
)

START, END = 0, 1


@pytest.fixture(scope="module")
def tokenizer():
    """Four tokens, one of which ends a text."""
    backend = Tokenizer(models.WordLevel({"<s>": START, "</s>": END, "a": 2, "b": 3}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tiny():
    """A random one-layer GPT-2 over four tokens, in float64."""
    settings = GPT2Config(
        vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=START, eos_token_id=END, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(settings).double().eval()
    model.config._attn_implementation = "eager"
    return model


def every_text(longest: int) -> list[tuple[int, ...]]:
    """All token sequences that a model over four tokens can write: up to the first end token, or `longest` tokens without one."""
    words = [token for token in range(4) if token != END]
    ended = [(*head, END) for length in range(longest) for head in itertools.product(words, repeat=length)]
    return ended + list(itertools.product(words, repeat=longest))


def as_samples(texts, longest: int) -> Samples:
    """The same layout as `sample` returns."""
    ids = torch.tensor([[START, *text, *[END] * (longest - len(text))] for text in texts])
    labels = torch.tensor([[-100, *text, *[-100] * (longest - len(text))] for text in texts])
    return Samples(ids, labels, [" ".join(map(str, text)) for text in texts])


def exact_log_probability(model, text) -> torch.Tensor:
    """Token by token, each from a context of its own: no padding, no cache, no batch."""
    total = torch.zeros((), dtype=torch.float64)
    for position, token in enumerate(text):
        logits = model(input_ids=torch.tensor([[START, *text[:position]]])).logits[0, -1]
        total = total + logits[token] - logits.logsumexp(0)
    return total


def score_of(text) -> float:
    """Something that no formula of the tokens' probabilities would guess."""
    return float(len(text)) + 0.7 * text.count(2) ** 2 - 1.3 * (text[0] == 3)


def gradient(value, model) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)])


def weights_of(scores, dealings=None) -> torch.Tensor:
    """The weights of texts that are scored one by one, or in the given dealings, each a list of groups of positions."""
    if dealings is None:
        dealings, scores = [[[index] for index in range(len(scores))]], [scores]
    return text_weights(torch.tensor(dealings), torch.tensor(scores, dtype=torch.float64))


def exact_expectation(model, longest: int) -> torch.Tensor:
    """E[s] as the sum over all texts, differentiable by plain autograd."""
    return sum(exact_log_probability(model, text).exp() * score_of(text) for text in every_text(longest))


def test_log_probabilities_are_those_of_whole_texts(tiny):
    """Batched and padded as token by token; over all texts they sum to one."""
    texts = every_text(3)
    found = log_probabilities(tiny, as_samples(texts, 3))
    assert len(texts) == 40
    torch.testing.assert_close(found, torch.stack([exact_log_probability(tiny, text) for text in texts]), rtol=0, atol=1e-12)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("form", ["ratio", "log"])
def test_expected_gradient_is_the_exact_gradient(tiny, form):
    """Over every pair of texts, weighted by its probability: the gradient of Phi at phi_0 is that of E[s], to rounding."""
    texts = every_text(2)
    probability = torch.stack([exact_log_probability(tiny, text) for text in texts]).exp().detach()
    expected = 0.0
    for i, j in itertools.product(range(len(texts)), repeat=2):
        phi = ScoreFunction(tiny, as_samples([texts[i], texts[j]], 2), weights_of([score_of(texts[i]), score_of(texts[j])]), form)(tiny)
        assert phi.item() == 0.0  # at phi_0
        expected = expected + probability[i] * probability[j] * gradient(phi, tiny)
    torch.testing.assert_close(expected, gradient(exact_expectation(tiny, 2), tiny), rtol=0, atol=1e-10)


DEALINGS = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3, 0], [1, 2]]]  # of four texts into two groups


def score_of_pair(first, second) -> float:
    """A score of two texts together that is no sum over them."""
    return float(len({*first, *second})) + 0.5 * (first == second) + score_of(first) * score_of(second)


def test_expected_gradient_of_groups_is_the_exact_gradient(tiny):
    """Over all draws of four texts: unbiased for every number of dealings, and the more dealings, the less variance."""
    texts = every_text(1)
    logs = torch.stack([exact_log_probability(tiny, text) for text in texts])
    exact = gradient(
        sum((logs[i] + logs[j]).exp() * score_of_pair(texts[i], texts[j]) for i, j in itertools.product(range(4), repeat=2)), tiny
    )
    slopes = torch.stack([gradient(exact_log_probability(tiny, text), tiny) for text in texts])
    spread = []
    for count in (1, 2, 3):
        expected, square = 0.0, 0.0
        for draw in itertools.product(range(4), repeat=4):
            written = [texts[index] for index in draw]
            scores = [[score_of_pair(written[a], written[b]) for a, b in dealing] for dealing in DEALINGS[:count]]
            found = weights_of(scores, DEALINGS[:count]) @ slopes[list(draw)]
            probability = logs.detach()[list(draw)].sum().exp()
            expected, square = expected + probability * found, square + probability * found.square()
            if draw == (0, 1, 2, 3):  # the same numbers as the gradient of Phi itself
                phi = ScoreFunction(tiny, as_samples(written, 1), weights_of(scores, DEALINGS[:count]))(tiny)
                torch.testing.assert_close(gradient(phi, tiny), found, rtol=0, atol=1e-10)
        torch.testing.assert_close(expected, exact, rtol=0, atol=1e-10)
        spread.append((square - expected.square()).sum().item())
    assert spread[0] > spread[1] > spread[2] > 0


def test_sampled_gradient_converges(tiny, tokenizer):
    """With 4,000 sampled texts, within four standard errors of the exact gradient along three random directions."""
    count = 4000
    samples = sample(tiny, tokenizer, count, 3, seed=1)
    texts = [tuple(token for token in row.tolist() if token != -100) for row in samples.labels]
    scores = [score_of(text) for text in texts]
    estimate = gradient(ScoreFunction(tiny, samples, weights_of(scores))(tiny), tiny)
    exact = gradient(exact_expectation(tiny, 3), tiny)
    # One text's part of the estimate along a direction is its advantage times the derivative of its log probability.
    unique = every_text(3)
    slopes = torch.stack([gradient(exact_log_probability(tiny, text), tiny) for text in unique])
    row_of = [unique.index(text) for text in texts]
    advantages = leave_one_out(torch.tensor(scores, dtype=torch.float64))
    directions = torch.randn(3, len(exact), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction in directions:
        parts = advantages * (slopes @ direction)[row_of]
        assert (estimate @ direction).item() == pytest.approx(parts.mean().item(), abs=1e-10)
        error = parts.std().item() / math.sqrt(count)
        assert abs(((estimate - exact) @ direction).item()) < 4 * error
        assert error < abs((exact @ direction).item())  # and it can tell the gradient from zero


def test_the_sampler_draws_from_the_model(tiny, tokenizer):
    """Chi-square of 5,000 texts against the exact probabilities of all 40, one row after the other and with the cache."""
    samples = sample(tiny, tokenizer, 5000, 3, seed=2)
    unique = every_text(3)
    probability = torch.stack([exact_log_probability(tiny, text) for text in unique]).exp().detach()
    found = torch.zeros(40)
    for row in samples.labels:
        found[unique.index(tuple(token for token in row.tolist() if token != -100))] += 1
    often = 5000 * probability >= 5  # the chi-square approximation needs five expected counts
    observed = [*found[often].tolist(), found[~often].sum().item()]
    expected = [*(5000 * probability[often]).tolist(), (5000 * probability[~often]).sum().item()]
    assert len(observed) > 15
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-3
    assert samples.texts[0] == tokenizer.decode([t for t in samples.labels[0].tolist() if t != -100], skip_special_tokens=True)


@pytest.fixture(scope="module")
def moved(tiny):
    """The tiny model's parameters somewhere else."""
    generator = torch.Generator().manual_seed(0)
    return {name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in tiny.named_parameters()}


def test_expected_phi_is_the_exact_change_anywhere(tiny, moved):
    """`ratio`, over every pair of texts: at another model it is E[s] there minus E[s] at phi_0, not only to first order."""
    texts = every_text(2)
    before = torch.stack([exact_log_probability(tiny, text) for text in texts]).exp().detach()
    pairs = list(itertools.product(range(len(texts)), repeat=2))
    phis = [
        ScoreFunction(tiny, as_samples([texts[i], texts[j]], 2), weights_of([score_of(texts[i]), score_of(texts[j])])) for i, j in pairs
    ]
    start = exact_expectation(tiny, 2).item()
    with loaded(tiny, moved), torch.no_grad():
        after = torch.stack([exact_log_probability(tiny, text) for text in texts]).exp()
        assert (after / before).max() < RATIO_LIMIT and (after / before - 1).abs().max() > 0.1
        expected = sum(before[i] * before[j] * phi(tiny) for (i, j), phi in zip(pairs, phis, strict=True))
        assert expected.item() == pytest.approx(exact_expectation(tiny, 2).item() - start, abs=1e-10)


def test_phi_is_a_covariance(tiny, moved, tokenizer):
    """By numpy's covariance of the scores with the log-ratio, or with the ratio, truncated where it is large."""
    import numpy as np

    samples = sample(tiny, tokenizer, 50, 3, seed=3)
    scores = [float(len(text)) for text in samples.texts]
    log, ratio = (ScoreFunction(tiny, samples, weights_of(scores), form) for form in ("log", "ratio"))
    before = log_probabilities(tiny, samples).detach()
    for far in (1, 6):
        elsewhere = {name: p + (far - 1) * (p - dict(tiny.named_parameters())[name].detach()) for name, p in moved.items()}
        with loaded(tiny, elsewhere):
            change = (log_probabilities(tiny, samples) - before).detach().numpy()
            assert log(tiny).item() == pytest.approx(np.cov(scores, change)[0, 1], rel=1e-10)
            truncated = np.minimum(np.exp(change), RATIO_LIMIT)
            assert ratio(tiny).item() == pytest.approx(np.cov(scores, truncated)[0, 1], rel=1e-10)
    assert np.exp(change).max() > RATIO_LIMIT  # the far model was far enough to tell


def test_one_seed_pairs_two_models(tiny, tokenizer):
    """The same seed gives the same texts; a slightly different model writes mostly the same ones; another seed does not."""
    texts = sample(tiny, tokenizer, 200, 3, seed=4).texts
    assert sample(tiny, tokenizer, 200, 3, seed=4).texts == texts
    with loaded(tiny, {"transformer.ln_f.bias": tiny.transformer.ln_f.bias + 0.01}):
        near = sample(tiny, tokenizer, 200, 3, seed=4).texts
    same = sum(a == b for a, b in zip(texts, near, strict=True))
    assert same > 180 and same > sum(a == b for a, b in zip(texts, sample(tiny, tokenizer, 200, 3, seed=5).texts, strict=True))


def test_global_randomness_is_left_alone(tiny, tokenizer):
    before = torch.random.get_rng_state()
    sample(tiny, tokenizer, 8, 3, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_tokenizer_without_a_start_token_starts_with_its_end_token(tiny):
    """GPT-2's layout: one token stands between texts, and the one in front does not end the text."""
    backend = Tokenizer(models.WordLevel({"x": 0, "|": 1, "a": 2, "b": 3}, unk_token="x"))
    samples = sample(tiny, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="|"), 64, 3, seed=0)
    assert (samples.input_ids[:, 0] == END).all() and (samples.labels[:, 0] == -100).all()
    assert (samples.labels[:, 1] != -100).all()
    for row in samples.labels[:, 1:].tolist():
        kept = [token for token in row if token != -100]
        assert row[: len(kept)] == kept and END not in kept[:-1]


def test_scores_are_remembered_and_forgotten():
    """Each new text is scored once, in one call; the oldest go first."""
    calls = []

    def score(texts):
        calls.append(list(texts))
        return [len(text) for text in texts]

    remembered = Remembered(score, limit=2)
    assert remembered(["a", "bb", "a"]) == [1.0, 2.0, 1.0]
    assert remembered(["bb", "ccc"]) == [2.0, 3.0]  # "a" is dropped now
    assert remembered(["a", "ccc"]) == [1.0, 3.0]
    assert calls == [["a", "bb"], ["ccc"], ["a"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": "upp"}, "task.goal=upp: no such goal; did you mean 'up'?"),
        ({"form": "rato"}, "task.form=rato: no such form of Phi; did you mean 'ratio'?"),
        ({"samples": 20}, "task.samples=20: must be 2 or more groups of group=8; write samples=512"),
        ({"samples": 8}, "task.samples=8: must be 2 or more groups of group=8"),
        ({"fresh": 0}, "task.fresh=0: must be 1 or more groups of group=8"),
        ({"group": 1, "samples": 1}, "task.samples=1: must be 2 or more texts; write samples=64"),
        ({"group": 0}, "task.group=0: a score reads one text or more"),
        ({"regroupings": 0}, "task.regroupings=0: the texts are dealt into groups once or more"),
        ({"max_tokens": 0}, "task.max_tokens=0: a text needs a token or more"),
    ],
)
def test_bad_options_say_what_is_wrong(change, message):
    good = {"goal": "up", "form": "ratio", "samples": 64, "fresh": 64, "max_tokens": 24, "group": 8}
    with pytest.raises(UserError) as error:
        Surrogate(Options(good | change), len, dict)
    assert message in str(error.value) and "\n" not in str(error.value)
