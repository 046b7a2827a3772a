"""Where there is no terminal, a line now and then: enough to know that it goes on, too few to fill a disk."""

from __future__ import annotations

import io

from rich.console import Console

from dpgbench import config
from dpgbench.cli.progress import Display, lasting


def test_a_log_has_the_first_step_and_then_a_line_every_half_minute():
    """Steps of one second, sixty of them; a cell without steps is told by what it counts."""
    file, now = io.StringIO(), [0.0]
    (spec,) = (cell.spec for cell in config.read(["task=l2_norm", "method=dpg"], sweep=True).cells)
    with Display(Console(file=file, width=240), 1, clock=lambda: now[0]) as display:
        display(spec, {"state": "started"})
        display(spec, {"snapshot": 0, "phi": 0.4})
        for step in range(1, 61):
            now[0] += 1.0
            display(spec, {"step": step, "phi": 0.5, "tokens_generated": 100 * step})
        display(spec, {"snapshot": 60, "measures": {"norm[red]": 1.0}})
        display(spec, {"state": "done"})
    started, first, second, done = file.getvalue().splitlines()
    assert started == "started l2_norm dpg seed 0" and done == "done   l2_norm dpg seed 0  norm[red] 1"
    assert first == "running l2_norm dpg seed 0  step 1/60  Phi 0.5  100 tokens  1 s so far"
    assert second == "running l2_norm dpg seed 0  step 31/60  Phi 0.5  3.1k tokens  31 s so far, about 29 s left"


def test_a_method_without_steps_says_what_it_counts():
    file = io.StringIO()
    (spec,) = (cell.spec for cell in config.read(["task=l2_norm", "method=prompt_only"], sweep=True).cells)
    display = Display(Console(file=file, width=240), 1, clock=lambda: 0.0)
    for event in ({"state": "started"}, {"candidate": 1, "phi": 1.0}, {"state": "failed"}):
        display(spec, event)
    assert "candidate 1  Phi 1" in file.getvalue() and display.failed == [spec]


def test_times_are_rough():
    assert [lasting(seconds) for seconds in (0.4, 119, 120, 7300, 2e5)] == ["0 s", "119 s", "2 min", "2 h", "2 days"]
