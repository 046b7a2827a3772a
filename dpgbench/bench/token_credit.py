"""Credit for single tokens of a completion: from what each label of the target's training earned to the advantage of each generated token.

A text's metagradient tau_i is the sum of its labels' tau_{i,t} (`metagrad.metagradients`, per_token). The target's loss is causal: token t
of a text has no part in the losses of the labels before it. So what a text adds to Phi from token t on, Phi less Phi with those labels'
weights at zero, is all that token t can answer for; its first-order term is the **return-to-go** sum_{s >= t} tau_{i,s}. Paid instead of
tau_i it leaves out what was settled before t, which is noise to token t: less variance, and the same expectation but for terms of order
1/N, as tau_i has them anyway. A baseline that does not see token t takes away more. This is reward-to-go with a baseline (Sutton et al.
1999, "Policy gradient methods"); the DPG paper (arXiv 2604.08423) pays every token tau_i. An influence that is linear in a text's gradient
is such a sum as well, and there nothing is left out: it does not hang on the other texts, so tails are its exact credit.

`in_generated_tokens` moves credit from the target's tokens to the generator's, `Baseline` knows what a return-to-go is compared with, and
`token_advantages` scales what is left.

Shape suffixes: N completions, those of one prompt adjacent; L the target's tokens; W the generator's tokens of the longest completion; R
tokens of all completions; D features.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpgbench.bench.flops import critic_code, critic_features, critic_flops
from dpgbench.core.seeds import derive
from dpgbench.worlds.generator import Generator

# ---------------------------------------------------------------- from the target's tokens to the generator's


def in_generated_tokens(
    credit_NL: Tensor,
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    generator: Generator,
    reader: PreTrainedTokenizerBase,
) -> Tensor:
    """(N, W) float64: the credit of the target's tokens, each paid to the generator's token whose characters it ends in. Sums are kept.

    credit_NL: column t belongs to token t of a text as `worlds.world.encode` has the target's tokenizer, `reader`, read it: the text, the
    end, cut to L. completion_ids: as `Generator.write` gives them, `texts` what `Generator.texts_of` made of them.

    The end's credit goes to a completion's end, or to its last token where it was cut without one. What lies beyond L earned nothing. A
    target's token that several of the generator's wrote goes to the last of them, so that none of them is denied what it took part in;
    where a tokenizer cannot say which characters its tokens have, all goes to the last token, which is the credit of the whole text.
    With two different tokenizers a target's token may also hang on characters after it, for where it ends is decided by what follows:
    there the credit is causal only up to the word. Cost: each text is read again by both tokenizers.
    """
    ends = set(generator.ends)
    bodies = [list(ids[:-1]) if len(ids) and ids[-1] in ends else list(ids) for ids in completion_ids]
    written_ends = _written_ends(generator.tokenizer, bodies, texts)
    read = reader(list(texts), return_offsets_mapping=reader.is_fast)
    credit_NL = credit_NL.detach().double().cpu()
    result = torch.zeros(len(texts), max(map(len, completion_ids)), dtype=torch.float64)
    for row, ids in enumerate(completion_ids):
        last = len(ids) - 1
        labels = len(read["input_ids"][row])
        if reader.is_fast:
            places, place = [], 0
            for _, end in read["offset_mapping"][row]:  # of a special token, such as one that begins a text, it is 0
                place = max(place, min(last, bisect_left(written_ends[row], end)))
                places.append(place)
        else:
            places = [last] * labels
        places = torch.tensor([*places, last][: credit_NL.shape[1]])
        result[row].index_add_(0, places, credit_NL[row, : len(places)])
        result[row, last] += credit_NL[row, len(places) :].sum()  # of pads: zero
    return result


def _written_ends(tokenizer: PreTrainedTokenizerBase, bodies: Sequence[list[int]], texts: Sequence[str]) -> list[list[int]]:
    """How many characters of its text are settled once each token has been written, never too many.

    A text that the tokenizer reads as it was written has them from its offsets; any other one, from what its first tokens spell."""
    again = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True) if tokenizer.is_fast else None
    result = []
    for row, (body, text) in enumerate(zip(bodies, texts, strict=True)):
        if again is not None and again["input_ids"][row] == body:
            spans = again["offset_mapping"][row]
            starts = [*(start for start, _ in spans), len(text)]
            # Tokens that share a character (bytes of it) have the same span: it is settled with the last of them.
            settled = [end if following >= end else start for (start, end), following in zip(spans, starts[1:], strict=True)]
        else:
            spelled = tokenizer.batch_decode([body[: count + 1] for count in range(len(body))], skip_special_tokens=True)
            settled = [_shared(said, text) for said in spelled]
        for place in range(1, len(settled)):
            settled[place] = max(settled[place], settled[place - 1])
        if settled:
            settled[-1] = len(text)
        result.append(settled)
    return result


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# ---------------------------------------------------------------- advantages


def returns_to_go(credit_NW: Tensor) -> Tensor:
    """(N, W): of each token, its own credit and that of those after it."""
    return credit_NW.flip(1).cumsum(1).flip(1)


def discounted(credit_NW: Tensor, discount: float) -> Tensor:
    """(N, W): credit whose returns-to-go are the discounted ones of `credit_NW`, G_t = c_t + discount * G_{t+1}.

    Less variance, where what comes long after a token is mostly noise to it, and a bias: what a token truly leads to later counts for
    less. 0 pays a token its own credit alone, 1 changes nothing."""
    result_NW, following_N = credit_NW.clone(), torch.zeros_like(credit_NW[:, 0])  # G_{t+1}
    for place in reversed(range(credit_NW.shape[1])):
        result_NW[:, place] -= (1 - discount) * following_N
        following_N = credit_NW[:, place] + discount * following_N
    return result_NW


def token_advantages(returns_NW: Tensor, baseline_NW: Tensor, alive_NW: Tensor, group_size: int, scaling: str) -> Tensor:
    """(N, W) float32: returns-to-go less the baseline, 0 where a completion has no token, divided by one number for several completions.

    scaling: "none" divides by 1, "batch" by the standard deviation of these differences over all tokens, "group" over those of a prompt's
    completions (ddof=1). Where that is no more than rounding, advantages are 0.
    """
    centred_NW = (returns_NW - baseline_NW) * alive_NW
    if scaling == "none":
        return centred_NW.float()
    rows = len(returns_NW) if scaling == "batch" else group_size
    parts = zip(centred_NW.split(rows), returns_NW.split(rows), alive_NW.split(rows), strict=True)
    scaled = []
    for centred, returns, alive in parts:
        deviation = centred[alive].std() if int(alive.sum()) > 1 else centred.new_zeros(())
        noise = 1e-12 * (returns * alive).abs().max()
        scaled.append(torch.where(deviation > noise, centred / deviation, 0.0))
    return torch.cat(scaled).float()


class Baseline:
    """What a return-to-go is compared with: (N, W), at each token a number that token t and those after it have no part in.

    group      the mean of the returns-to-go, at the same place, of the prompt's other completions that are so long; where none is, position
    position   the same over all other completions of the step; where none is so long, 0
    critic     position, and a ridge regression of what it leaves on what was written before the token and on how the prompt's other
               completions fared: where these tell nothing, the penalty leaves position

    The first two cost nothing and have no state. The critic is fitted on each half of a step's prompts, beside what it kept of earlier
    steps, which fades, and asked about the other half. Its features: the place (one-hot), the codes of the two tokens before, the mean of
    all codes before, and how the prompt's other completions fared, the mean of their tau. A token's code is its row of the generator's
    input embedding before training, standardised, and projected where it is wider than `flops.CODE`. `flops` is what the last step cost.
    """

    FADE = 0.7
    """What a step's sums count for in the next one. FADE and RIDGE were not tuned."""
    RIDGE = 0.03
    """The penalty, as a share of the features' mean sum of squares."""
    CHUNK = 256
    """Completions whose features are held at a time."""

    def __init__(self, kind: str, generator: Generator, group_size: int, seed: int = 0):
        """Make it before the generator is trained or its weights are restored: codes must be the same in a run that goes on."""
        self.kind, self.group_size, self.flops = kind, group_size, 0.0
        if kind == "critic":
            self._codes = _codes_of(generator, derive(seed, "critic"))
            self._places = generator.max_completion_tokens
            size = critic_features(self._places, self._codes.shape[1])
            self._past = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)

    def __call__(self, returns_NW: Tensor, completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """The baseline of a step's returns-to-go, (N, W) float64; the critic learns from them as well."""
        alive_NW = alive(completion_ids, returns_NW.shape[1])
        position_NW, there = _mean_of_others(returns_NW, alive_NW, len(returns_NW))
        if self.kind == "position":
            return torch.where(there, position_NW, 0.0)
        if self.kind == "critic":
            return torch.where(there, position_NW, 0.0) + self._critic(returns_NW, alive_NW, completion_ids)
        group_NW, in_group = _mean_of_others(returns_NW, alive_NW, self.group_size)
        return torch.where(in_group, group_NW, torch.where(there, position_NW, 0.0))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return dict(zip(("critic.products", "critic.targets"), self._past, strict=True)) if self.kind == "critic" else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As it was when `tensors` gave these."""
        if self.kind == "critic":
            self._past = tensors["critic.products"].clone(), tensors["critic.targets"].clone()

    # ---- the critic

    def _critic(self, returns_NW: Tensor, alive_NW: Tensor, completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """(N, W): what to add to position."""
        totals_N = returns_NW[:, 0]
        scale = max(float(totals_N.std(correction=0)), 1e-300)  # so that old steps and new ones add up
        fares_N = self._others_fare(totals_N) / scale
        half_N = (torch.arange(len(returns_NW)) // self.group_size) % 2
        left_NW, sums = torch.zeros_like(returns_NW), []
        for half in (0, 1):
            mine_N = half_N == half  # what position leaves of this half's, by this half alone: what judges the other must not hang on it
            position_NW, there = _mean_of_others(returns_NW[mine_N], alive_NW[mine_N], max(1, int(mine_N.sum())))
            left_NW[mine_N] = returns_NW[mine_N] - torch.where(there, position_NW, 0.0)
            products, targets = (torch.zeros_like(part) for part in self._past)
            for rows in self._chunks(mine_N):
                x_RD = self._features(completion_ids, rows, alive_NW, fares_N)
                products += x_RD.T @ x_RD
                targets += x_RD.T @ (left_NW[rows][alive_NW[rows]] / scale)
            sums.append((products, targets))
        baseline_NW = torch.zeros_like(returns_NW)
        for half in (0, 1):
            products, targets = (other + past for other, past in zip(sums[1 - half], self._past, strict=True))
            penalty = self.RIDGE * products.diagonal().mean() + 1e-6
            fitted_D = torch.linalg.solve(products + penalty * torch.eye(len(products), dtype=products.dtype), targets)
            for rows in self._chunks(half_N == half):
                predicted = torch.zeros(len(rows), returns_NW.shape[1], dtype=torch.float64)
                predicted[alive_NW[rows]] = self._features(completion_ids, rows, alive_NW, fares_N) @ fitted_D * scale
                baseline_NW[rows] = predicted
        self._past = tuple(self.FADE * (past + one + other) for past, one, other in zip(self._past, *sums, strict=True))
        self.flops = critic_flops(int(alive_NW.sum()), len(self._past[1]))
        return baseline_NW

    def _chunks(self, chosen_N: Tensor) -> Sequence[Tensor]:
        rows = chosen_N.nonzero()[:, 0]
        return rows.split(self.CHUNK) if len(rows) else ()

    def _others_fare(self, totals_N: Tensor) -> Tensor:
        """(N,): the mean metagradient of the prompt's other completions, less that of all."""
        groups = totals_N.view(-1, self.group_size)
        others = (groups.sum(1, keepdim=True) - groups) / max(1, self.group_size - 1)
        return (others - totals_N.mean()).flatten() if self.group_size > 1 else torch.zeros_like(totals_N)

    def _features(self, completion_ids: Sequence[Sequence[int]], rows: Tensor, alive_NW: Tensor, fares_N: Tensor) -> Tensor:
        """(R, D) float64, of all tokens of the completions `rows`: none sees the token that it is of, or a later one."""
        alive_BW = alive_NW[rows]
        count, width = alive_BW.shape
        ids_BW = torch.zeros(count, width, dtype=torch.long)
        for place, row in enumerate(rows.tolist()):
            ids_BW[place, : len(completion_ids[row])] = torch.as_tensor(completion_ids[row])
        codes = self._codes[ids_BW] * alive_BW[..., None]
        before, before_that = torch.zeros_like(codes), torch.zeros_like(codes)
        before[:, 1:], before_that[:, 2:] = codes[:, :-1], codes[:, :-2]
        mean = before.cumsum(1) / torch.arange(width, dtype=torch.float64).clamp(min=1)[None, :, None]
        places = torch.eye(width, self._places, dtype=torch.float64).expand(count, -1, -1)
        fares = fares_N[rows][:, None, None].expand(count, width, 1)
        return torch.cat([places, before, before_that, mean, fares], 2)[alive_BW]


def alive(completion_ids: Sequence[Sequence[int]], width: int) -> Tensor:
    """(N, W): where a completion has a token."""
    return torch.arange(width)[None] < torch.tensor([len(ids) for ids in completion_ids])[:, None]


def _mean_of_others(returns_NW: Tensor, alive_NW: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """At each place the mean over the others of a run of `group_size` completions that have a token there, and whether there is one."""
    shape = (-1, group_size, returns_NW.shape[1])
    values, there = (returns_NW * alive_NW).view(shape), alive_NW.view(shape)
    count = there.sum(1, keepdim=True) - there.long()
    mean = (values.sum(1, keepdim=True) - values) / count.clamp(min=1)
    return mean.view_as(returns_NW), (count > 0).view_as(alive_NW)


def _codes_of(generator: Generator, seed: int) -> Tensor:
    """(V, C) float64, see `Baseline`."""
    table = generator.model.get_input_embeddings().weight.detach().float().cpu()
    mean, deviation, code = table.mean(0), table.std().clamp(min=1e-30), critic_code(table.shape[1])
    if code < table.shape[1]:
        projection = torch.randn(table.shape[1], code, generator=torch.Generator().manual_seed(seed)) / table.shape[1] ** 0.5
        table, mean = table @ projection, mean @ projection
    return ((table - mean) / deviation).double()
