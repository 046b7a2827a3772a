"""How far a budget reaches: the largest count that it pays for, and whether one more step does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OVERRUN = 0.01  # of the budget that an answer may cost more; a step's price is known when it is paid
BUDGET = "budget"  # the word for an option that is to be as large as the budget allows (`Method.budget_options`)


@dataclass
class Spending:
    """Shares of the budget: what is spent, and what the dearest step was."""

    spent: float = 0.0
    dearest: float = 0.0

    def leaves_a_step(self, step: int, share: float) -> bool:
        """Told the share spent after each step: whether another one as dear as the dearest fits."""
        self.dearest = max(self.dearest, share - self.spent) if step > 1 else share - self.spent
        self.spent = share
        return step == 0 or self.spent + self.dearest <= 1


def largest_within(share_of: Callable[[int], float]) -> int:
    """The largest count whose share of the budget is at most 1; 1 where not even that is.

    `share_of` must grow with the count, and is expected to grow about in proportion: a few guesses, each from the one before, come close,
    and from there it goes on by ones, so that hardly more is asked for than fits. Raises ValueError if one costs nothing: there is no end.
    """
    fits, share = 1, share_of(1)
    if share > 1:
        return 1
    if share <= 0:
        raise ValueError("one takes no share of the budget, so no count is the largest; is there a budget?")
    for caution in (0.5, 0.9, 1.0):
        guess = int(caution * fits / share)
        if guess > fits and (found := share_of(guess)) <= 1:
            fits, share = guess, found
    while share_of(fits + 1) <= 1:
        fits += 1
    return fits
