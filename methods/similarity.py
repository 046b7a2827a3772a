"""GRPO on what a text looks like: the task's own score, or its likeness to texts that show what is wanted (arXiv 2604.08423, baselines).

No target is trained. The reward of completion x, with R the task's `references` (a string to teach, the dev split of a language):

    score         Task.score(x): what best of n picks by as well, so that the two differ in how they use a reward and not in the reward
    levenshtein   max_{r in R} 1 - distance(x, r) / max(|x|, |r|), in composed (NFC) characters, no whitespace (rapidfuzz)
    embedding     max_{r in R} cos(e(x), e(r)), e the mean of phi_0's input embeddings over a text's tokens
    langid        1 if the corpus's identifier finds in x the language it finds in most of R, else 0 (no language at all counts as one)

Where ours differs from the authors': they average over all references, count edits between token sequences without dividing by a length,
pay the probability that fastText gives the language, and embed with a multilingual sentence encoder. Ours take the nearest reference,
for a text need be like one of them only; do not grow with a text's length; and need no download. Theirs, but for the encoder, are options:
`over_references=mean`; `edit_distance=tokens`, -distance(x, r) in tokens of the target; `language_score=probability` (in the phrasebook,
which has no probability, the share of words that the language has).

The embedding is static, offline, there at every scale without a further package, and has a row for every token that the target knows.
Cost per step: sampling and 3 forward passes' worth of policy update; the rewards run no model, so they cost seconds and, but for the
embedding's products with R, no FLOPs. It fails where what is wanted does not occur among the completions (all scores of a group are equal:
no signal), where a score is fooled (one word of the language, over and over; words of several languages, to a target that hardly knows
them), and says nothing of what training on the texts does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from dpgbench.api import Method, Options, Snapshot, TaskInfo
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.worlds.text_files import squeezed

if TYPE_CHECKING:
    from torch import Tensor

    from dpgbench.bench.grpo import Rollouts
    from dpgbench.bench.workbench import Workbench

Scores = Callable[[Sequence[str]], "Sequence[float] | Tensor"]
CHOICES = {
    "reward": ("score", "levenshtein", "embedding", "langid"), "over_references": ("max", "mean"), "edit_distance": ("relative", "tokens"),
    "language_score": ("identified", "probability"),
}  # fmt: skip


class Similarity(Method):
    version = 4

    def __init__(self, options: Options):
        super().__init__(options)
        for name, choices in CHOICES.items():
            if options[name] not in choices:
                what = name.replace("_", " ").replace("over references", "way over references")
                raise UserError(f"method.{name}={options[name]}: no such {what}; {did_you_mean(options[name], choices)}")
        self._chosen: Scores | None = None

    def supports(self, task: TaskInfo) -> str | None:
        if self.options.reward == "score" and "score" not in task.defines:
            return f"{task.name} has no black-box score of a text"
        if self.options.reward != "score" and "references" not in task.defines:
            return f"{task.name} has no references, texts that show what is wanted"

    def target_passes(self, steps: int) -> float:
        return 0.0

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.bench.grpo import train_policy

        self._scores(bench)  # a task without references is told so before anything is spent
        yield from train_policy(bench, partial(self.rewards, bench))

    def rewards(self, bench: Workbench, rollouts: Rollouts) -> Sequence[float] | Tensor:
        return self._scores(bench)(rollouts.completions)

    def _scores(self, bench: Workbench) -> Scores:
        """The chosen reward, its references read once."""
        if self._chosen is None:
            rewards = {"score": self._score, "levenshtein": self._levenshtein, "embedding": self._embedding, "langid": self._langid}
            self._chosen = rewards[self.options.reward](bench)
        return self._chosen

    def _score(self, bench: Workbench) -> Scores:
        return bench.scores

    def _levenshtein(self, bench: Workbench) -> Scores:
        from rapidfuzz.distance import Levenshtein

        def tokens(text: str) -> list[int]:
            return bench.world.target_tokenizer(text, add_special_tokens=False)["input_ids"]

        relative = self.options.edit_distance == "relative"
        read = squeezed if relative else tokens
        references = [read(text) for text in self._references(bench)]

        def like(text: str) -> Iterator[float]:
            written = read(text)
            for reference in references:
                yield Levenshtein.normalized_similarity(written, reference) if relative else -Levenshtein.distance(written, reference)

        return lambda texts: [self._over_references(like(text)) for text in texts]

    def _over_references(self, likeness: Iterable[float]) -> float:
        values = list(likeness)
        return max(values) if self.options.over_references == "max" else sum(values) / len(values)

    def _embedding(self, bench: Workbench) -> Scores:
        references_RD = self._embedded(bench, self._references(bench))

        def likeness(texts: Sequence[str]) -> Tensor:
            texts_ND = self._embedded(bench, texts)
            bench.meter.charge("scoring", 2.0 * texts_ND.numel() * len(references_RD))
            likeness_NR = texts_ND @ references_RD.T
            return likeness_NR.amax(1) if self.options.over_references == "max" else likeness_NR.mean(1)

        return likeness

    def _langid(self, bench: Workbench) -> Scores:
        ((wanted, _),) = Counter(bench.world.identify_language(self._references(bench))).most_common(1)
        if self.options.language_score == "probability":
            if wanted == "other":
                raise UserError("method.language_score=probability: the references are in no language; write language_score=identified")
            return lambda texts: bench.world.language_probabilities(texts, wanted)

        def in_it(texts: Sequence[str]) -> list[float]:
            return [float(language == wanted) for language in bench.world.identify_language(texts)]

        return in_it

    def _references(self, bench: Workbench) -> list[str]:
        """Raises UserError if the task has none after all."""
        references = bench.task.references()
        if not references:
            raise UserError(f"task={bench.spec.task.name}: no references with these options, and nothing to be like; write reward=score")
        return references

    def _embedded(self, bench: Workbench, texts: Sequence[str]) -> Tensor:
        """(N, D), rows of length 1, or 0 for a text of no tokens."""
        import torch

        table, tokenizer = bench.world.target.get_input_embeddings().weight.detach(), bench.world.target_tokenizer
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        means = [table[ids].float().mean(0) if ids else table.new_zeros(table.shape[1], dtype=torch.float32) for ids in tokens]
        return torch.nn.functional.normalize(torch.stack(means), dim=1)
