"""Goals about what the target *writes*, scored by any program: Phi = E_{y ~ target}[s(y)], made differentiable in the target.

s may be anything that maps a text to a number; it has no gradient. Its expectation has one: with p the distribution of texts that the
target with parameters phi writes from nothing (temperature 1, from the start token alone, cut at `max_tokens`),

    grad E_p[s] = sum_y s(y) grad p(y) = E_p[(s(y) - b) grad log p(y)]          for any b that does not depend on y,

because E_p[grad log p] = 0 (score function; Williams 1992, doi:10.1007/BF00992696). So draw N texts once from the initial target phi_0,
hold them fixed, and let r_j = p_phi(y_j) / p_phi0(y_j):

    Phi(phi) = 1/N sum_j (s(y_j) - b_j) (r_j - 1),        b_j = mean of s over the other N - 1 texts        (form: ratio, the default)
    Phi(phi) = 1/N sum_j (s(y_j) - b_j) log r_j                                                             (form: log)

- **Unbiased**: at phi_0 both have the gradient 1/N sum_j (s(y_j) - b_j) grad log p(y_j), an unbiased estimate of the gradient of E[s]. That
  needs the leave-one-out baseline, which does not depend on y_j (Kool, van Hoof, Welling 2019, "Buy 4 REINFORCE samples, get a baseline
  for free!"); the plain mean, y_j included, shrinks the gradient by 1 - 1/N.
- **Readable**: Phi(phi_0) = 0, and Phi estimates E_phi[s] - E_phi0[s] in the unit of s: `ratio` without bias for every phi, as
  importance sampling does (E_phi0[r] = 1), `log` to first order.
- **Variance**: Phi is the sample covariance of s with r (or log r), so its standard error is about sd(s) sd(r) / sqrt(N). Near phi_0 a
  change of the target whose log-ratio correlates with s by less than 1/sqrt(N), 0.04 at N = 512, is lost in the noise. A method can also
  learn the noise of these N texts, which is why people read fresh samples instead.
- **Limit**: the texts are phi_0's. Far from it sd(r) grows exponentially in the divergence, so r is truncated at RATIO_LIMIT (Ionides
  2008, doi:10.1198/106186008X320456): a text ten times as likely earns no more, a bias towards phi_0. When every r is near 0, the trained
  target writes other things altogether and Phi says nothing. What phi_0 never writes cannot be asked for at all.
- **Why not log r**: it pays without end for making poor texts ever less likely. At scale tiny, trained in one step at 1e-2 on sentences
  cut off before their end, log r fell to -22 on average: for MTLD `log` gave +26, `ratio` +0.1, and fresh texts had lost 26. Over 40
  trained targets, the rank correlation of Phi with the measured change was 0.54 (`ratio`, not yet truncated) and 0.08 (`log`) for length,
  0.43 and -0.36 for MTLD, 0.56 and 0.47 for toxicity; the two agree after small steps. Self-normalised weights r_j / sum r did worse for
  MTLD and toxicity: when all r are near 0 they follow a single text.

A score that is only defined for long texts (MTLD) takes `group` = m texts read one after the other as one draw: s(y_1 .. y_m), with
log p the sum of the m. The same derivation over p^m; N is then the number of groups, and r_j - 1 the sum over the m (its first order: one
text of a group is phi's, the others phi_0's). For one text, the scores of the m - 1 other texts of its group are noise. The same texts are
therefore divided into random groups `regroupings` times. Each division gives an unbiased estimate, so their mean is unbiased too, and what
is left for each text is close to its own contribution to the score (a U-statistic; Hoeffding 1948, doi:10.1214/aoms/1177730196). This needs
more score computations but no more passes of the model.

Costs: a signal is one forward pass over the N texts, its gradient two more. Imports no torch at the top: plug-ins build a `Surrogate` in
their `__init__`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.core.options import Options
from dpgbench.core.seeds import derive, torch_seeded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from dpgbench.worlds.world import World

Score = Callable[[Sequence[str]], Sequence[float]]
"""s of each text."""
Reading = Callable[[list[str]], dict[str, float]]
"""What people read off a list of fresh texts, by name."""

FORMS = ("ratio", "log")
RATIO_LIMIT = 10.0  # ours: of the ratio p_phi / p_phi0 of one text
SAMPLED_AT_ONCE = 1024


class Samples(NamedTuple):
    """N texts that a model wrote from nothing."""

    input_ids: Tensor
    """(N, L) long: the start token, the text, its end token if it came to an end, and end tokens as padding."""
    labels: Tensor
    """The same with -100 on the start token and on the padding: the tokens that the model chose."""
    texts: list[str]


# ---- the estimator


def log_probabilities(model: nn.Module, samples: Samples) -> Tensor:
    """log p(y) of every whole text, its end included, under the model: (N,), differentiable."""
    from torch.nn.functional import pad

    from dpgbench.metagrad.fused import cross_entropy
    from dpgbench.metagrad.loss import by_length

    def summed(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return -cross_entropy(logits.flatten(0, 1), targets.flatten(), IGNORED_LABEL).view(targets.shape).sum(1)

    return by_length(summed, samples.input_ids, pad(samples.labels[:, 1:], (0, 1), value=IGNORED_LABEL))  # the last predicts nothing


def leave_one_out(scores: Tensor) -> Tensor:
    """s_j minus the mean of the others, (n,). That is n / (n - 1) times the distance from the mean of all."""
    n = len(scores)
    return (scores - scores.mean()) * (n / (n - 1))


def text_weights(dealings_KGM: Tensor, scores_KG: Tensor) -> Tensor:
    """What Phi pays for each text's ratio, (N,): the advantages of the groups it is dealt into, over the number of groups.

    Each of the K dealings puts the N texts into G groups of M; its G scores are compared among themselves. A text alone is a group of one.
    """
    import torch

    advantages_KG = torch.stack([leave_one_out(scores_G) for scores_G in scores_KG])
    weights_N = scores_KG.new_zeros(dealings_KGM[0].numel())
    weights_N.index_add_(0, dealings_KGM.flatten(), advantages_KG[..., None].expand(dealings_KGM.shape).flatten())
    return weights_N / advantages_KG.numel()


class ScoreFunction:
    """Phi (see the module): how much more likely than under the `initial` model each sample has become, times its weight, summed."""

    def __init__(self, initial: nn.Module, samples: Samples, weights: Tensor, form: str = "ratio"):
        import torch

        self.samples, self.form = samples, form
        with torch.no_grad():
            self.initial = log_probabilities(initial, samples)
        self.weights = weights.to(self.initial)

    def __call__(self, model: nn.Module) -> Tensor:
        log_ratio = log_probabilities(model, self.samples) - self.initial
        if self.form == "log":
            return (self.weights * log_ratio).sum()
        return (self.weights * log_ratio.clamp(max=math.log(RATIO_LIMIT)).expm1()).sum()


# ---- the texts


def sample(model: nn.Module, tokenizer: PreTrainedTokenizerBase, count: int, max_tokens: int, seed: int) -> Samples:
    """`count` texts at temperature 1 from the start token alone, each up to its end token or cut at `max_tokens` tokens.

    The start token is the tokenizer's BOS, or EOS where there is none (what stands before a text where texts are packed). A token is the
    winner of an exponential race whose noise depends on the seed alone (`decoding.race`), so that under one seed two models that differ
    little write mostly the same texts: a paired comparison.
    """
    import torch

    from dpgbench.worlds.generator import Generator

    writer = Generator(model, tokenizer, max_tokens, SAMPLED_AT_ONCE)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    written: list[list[int]] = []
    for first in range(0, count, SAMPLED_AT_ONCE):
        with torch_seeded(derive(seed, first)):
            written += writer.write([[start]] * min(SAMPLED_AT_ONCE, count - first))
    ids = torch.full((count, 1 + max(map(len, written))), tokenizer.eos_token_id)
    labels = torch.full_like(ids, IGNORED_LABEL)
    ids[:, 0] = start
    for row, text in enumerate(written):
        ids[row, 1 : 1 + len(text)] = labels[row, 1 : 1 + len(text)] = torch.tensor(text)
    return Samples(ids.to(model.device), labels.to(model.device), writer.texts_of(written))


# ---- what the tasks share


class Remembered:
    """A score that is computed once per text, in one call for all new ones: texts repeat, within a batch and over the steps."""

    def __init__(self, score: Score, limit: int = 100_000):
        self._score, self._limit, self._known = score, limit, {}

    def __call__(self, texts: Sequence[str]) -> list[float]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, map(float, self._score(new)), strict=True))
        scores = [self._known[text] for text in texts]
        while len(self._known) > self._limit:
            del self._known[next(iter(self._known))]  # the oldest
        return scores


class _Written:
    """Texts, and whose they are: the very tensors that the model had inside, not written to since. They are not kept alive."""

    def __init__(self, model: nn.Module, texts: list[str]):
        self.texts = texts
        self._weights = [(weakref.ref(tensor), tensor._version) for tensor in model.parameters()]

    def by(self, model: nn.Module) -> bool:
        """Whether this model, as it is now, has written them."""
        now = list(model.parameters())
        return len(now) == len(self._weights) and all(
            tensor() is weight and version == weight._version for (tensor, version), weight in zip(self._weights, now, strict=True)
        )


class Surrogate:
    """A task's Phi over fixed texts of phi_0, and the fresh texts of a trained target that people read.

    Options: `goal` (up, or down: Phi takes -s), `form` (ratio or log), `samples` (N texts for Phi), `fresh` (texts for people),
    `max_tokens`, and where a score takes several texts, `group` and `regroupings`. Both sets are drawn with fixed seeds of their own,
    whatever the cell's: Phi is part of the task, like the held-out texts of a language, and fresh texts are paired over methods, seeds
    and phi_0. Raises UserError on a bad option.
    """

    def __init__(self, options: Options, score: Score, read: Reading):
        self.options, self.score, self.read = options, Remembered(score), read
        self.group, self.dealings = options.get("group", 1), options.get("regroupings", 1)
        if options.goal not in ("up", "down"):
            raise UserError(f"task.goal={options.goal}: no such goal; {did_you_mean(options.goal, ('up', 'down'))}")
        if options.form not in FORMS:
            raise UserError(f"task.form={options.form}: no such form of Phi; {did_you_mean(options.form, FORMS)}")
        if options.max_tokens < 1:
            raise UserError(f"task.max_tokens={options.max_tokens}: a text needs a token or more; write max_tokens=24")
        if self.group < 1:
            raise UserError(f"task.group={self.group}: a score reads one text or more; write group=8")
        if self.dealings < 1:
            raise UserError(f"task.regroupings={self.dealings}: the texts are dealt into groups once or more; write regroupings=64")
        for name, least in (("samples", 2), ("fresh", 1)):
            value = options[name]
            if value < least * self.group or value % self.group:
                what = f"{least} or more groups of group={self.group}" if self.group > 1 else f"{least} or more texts"
                raise UserError(f"task.{name}={value}: must be {what}; write {name}={64 * self.group}")
        self.up = options.goal == "up"
        self._written: _Written | None = None

    def prepare(self, world: World) -> None:
        """Draw phi_0's texts, for Phi and for the comparison."""
        self.world = world
        positions = getattr(world.target.config, "max_position_embeddings", None)
        if positions and self.options.max_tokens >= positions:
            raise UserError(
                f"task.max_tokens={self.options.max_tokens}: the target has {positions} positions, one of them for the start token; "
                f"write max_tokens={positions - 1}"
            )
        samples = self._sample(world.target, "dev", self.options.samples)
        self.signal = ScoreFunction(world.target, samples, self._weights(samples.texts), self.options.form)
        self.before = self.fresh(world.target)

    def fresh(self, model: nn.Module) -> list[str]:
        """Texts that the model writes now; the same noise in every call. Written once for weights that are measured and then drawn."""
        if self._written is None or not self._written.by(model):
            self._written = _Written(model, self._sample(model, "test", self.options.fresh).texts)
        return self._written.texts

    def measure(self, model: nn.Module) -> dict[str, float]:
        """What there is to read off fresh texts, and each number's change from phi_0's."""
        before, after = self.read(self.before), self.read(self.fresh(model))
        return after | {f"{name}_change": value - before[name] for name, value in after.items()}

    def rehearse(self) -> dict[str, float]:
        """What `measure` gives, of a few of phi_0's texts against themselves."""
        found = self.read(self.before[: 4 * self.group])
        return found | {f"{name}_change": 0.0 for name in found}

    def better(self, texts: Sequence[str]) -> list[float]:
        """The score of each text, turned so that higher is better."""
        return [value if self.up else -value for value in self.score(texts)]

    def grouped(self, texts: Sequence[str]) -> list[str]:
        """Every `group` successive texts as one, read one after the other."""
        return [" ".join(texts[first : first + self.group]) for first in range(0, len(texts), self.group)]

    def draw(self, model: nn.Module, axes: Axes) -> None:
        """The scores of phi_0's texts in grey and of the model's in blue."""
        import numpy as np

        before, after = (self.score(self.grouped(texts)) for texts in (self.before, self.fresh(model)))
        # The upper percentile: one odd text must not squeeze all others into one bar.
        edges = np.linspace(min(before + after), max(np.percentile(before, 99), np.percentile(after, 99)) + 1e-9, 25)
        axes.hist(np.clip(before, None, edges[-1]), edges, color="0.75", label="before")
        axes.hist(np.clip(after, None, edges[-1]), edges, histtype="step", color="#0072b2", linewidth=1.5, label="after")
        axes.set_position((0.06, 0.14, 0.9, 0.82))
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, frameon=False)

    def _weights(self, texts: Sequence[str]) -> Tensor:
        import torch

        noise = torch.Generator().manual_seed(derive(0, "surrogate", "groups"))
        dealings_KN = torch.stack([torch.randperm(len(texts), generator=noise) for _ in range(self.dealings)])
        scores_KG = [self.better(self.grouped([texts[index] for index in dealing.tolist()])) for dealing in dealings_KN]
        # float64, so that the baseline cancels
        return text_weights(dealings_KN.view(self.dealings, -1, self.group), torch.tensor(scores_KG, dtype=torch.float64))

    def _sample(self, model: nn.Module, split: str, count: int) -> Samples:
        return sample(model, self.world.target_tokenizer, count, self.options.max_tokens, derive(0, "surrogate", split))
