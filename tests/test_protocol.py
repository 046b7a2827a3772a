"""A suite's protocol: how it is read, and the primary tests that a report makes of it, by hand."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
from frames import COMMAND, hole, row, small_frame

from dpgbench import config
from dpgbench.core.errors import UserError
from dpgbench.core.protocol import Protocol, read_protocol
from dpgbench.plugins.registry import Registry
from dpgbench.report import machine_readable, read_contents, table_files
from dpgbench.report.summary_tables import findings


def test_a_suite_says_its_protocol():
    found = config.protocol_of(Registry(), "methods")
    assert found.references and found.meaningful > 0
    assert config.protocol_of(Registry(), "smoke") == config.protocol_of(Registry(), "no such suite") == Protocol()


def test_reading_and_refusing():
    assert read_protocol({"references": ["dpg", "dpg"], "meaningful": 1}, "x.yaml") == Protocol(("dpg",), 1.0)
    assert read_protocol({"references": ["dpg"]}, "x.yaml") == Protocol(("dpg",), None)
    for bad, said in (
        ("dpg", "x.yaml: protocol is 'dpg'"),
        ({"reference": ["dpg"]}, "x.yaml: protocol.reference: no such key; did you mean 'references'"),
        ({"references": "dpg"}, "protocol.references is 'dpg', but it is a list"),
        ({"meaningful": 0.1}, r"protocol.references is \[\]"),
        ({"references": ["dpg"], "meaningful": True}, "protocol.meaningful is True, but it is a positive number"),
        ({"references": ["dpg"], "meaningful": 0}, "protocol.meaningful is 0, "),
    ):
        with pytest.raises(UserError, match=said):
            read_protocol(bad, "x.yaml")


def framed(oracle=1.2, **more):
    rows = pd.DataFrame([row(method="oracle", seed=seed, value=oracle) for seed in range(3)])
    return pd.concat([small_frame(), rows], ignore_index=True).assign(**more)


def test_whole_seeds_are_all_that_any_task_has():
    """Nine on one task and two on the other, which makes eleven pairs: nine seeds have a sign of their own."""
    values = [(task, seed, 0.2 + 0.1 * seed) for task, seeds in (("toy", 9), ("other", 2)) for seed in range(seeds)]
    rows = [row(task=task, method="dpg", seed=seed, value=value) for task, seed, value in values]
    rows += [row(task=task, seed=seed, value=0.1) for task, seed, _ in values]
    text = table_files(read_contents(pd.DataFrame(rows), "demo", Protocol(("dpg",))))["pooled.md"]
    (cells,) = [line.split("|") for line in text.splitlines() if line.startswith("| base ") and "p " in line]
    assert "p 0.0039" in cells[3], "2 / 2^9"
    assert "whatever the data" not in text, "which is said where the least p is 0.05 or more"


def squeezed(text):
    return re.sub(r" +", " ", text)


def test_the_primary_tests_by_hand():
    """base 0.2, oracle 1.2: the unit is 1. dpg minus best_n4: 0.3, 0.4, 0.8: mean 0.5, half-width 0.657, root mean square 0.545, S 0.918;
    minus late: 0.6, 0.5, 0.7: S 0.6 / 0.6055 = 0.991; minus base: 0.5, 0.6, 0.7, S the same. All p 2/8, over three questions 0.75."""
    contents = read_contents(framed(), "demo", Protocol(("dpg", "gone"), 0.05))
    text = squeezed(table_files(contents)["pooled.md"])
    for line in (
        "| best_n4 | 1 | 3 | +0.500 [-0.157, +1.157] | +0.92 | 0.25 | 0.75 | not shown | – |",
        "| late | 1 | 3 | +0.600 [+0.352, +0.848] | +0.99 | 0.25 | 0.75 | not shown | – |",
        "| base (reference) | 1 | 3 | +0.600 [+0.352, +0.848] | +0.99 | 0.25 | 0.75 | not shown | – |",
        "References of the protocol without a cell here: gone.",
        "With 3 seeds the smallest p that whole seeds can reach is 0.25, 0.75 after Holm's correction for 3 comparisons",
    ):
        assert line in text, line
    assert "- [pooled](pooled.md)" in table_files(contents)["summary.md"]
    assert "Over all tasks dpg is not shown to differ from best_n4, late, base." in findings(
        contents.results, contents.across, contents.winners
    )
    lower = read_contents(framed(-0.8, higher_is_better=False), "demo", Protocol(("dpg",), 0.05))
    assert "| best_n4 | 1 | 3 | -0.500 [-1.157, +0.157] | -0.92 |" in squeezed(table_files(lower)["pooled.md"]), "lower is better"


def test_two_references_are_compared_once_and_without_an_oracle_the_unit_is_the_spread():
    """Of dpg (sd 0.2) and best_n4 (sd 0.1) the unit is sqrt((0.04 + 0.01) / 2) = 0.158: 0.5 / 0.158 = 3.162."""
    contents = read_contents(small_frame(), "demo", Protocol(("dpg", "best_n4"), 0.05))
    assert len(contents.across.pooled) == 5 and ("best_n4", "dpg") not in contents.across.pooled
    assert contents.across.pooled["dpg", "best_n4"].effect.mean == pytest.approx(3.1623, abs=1e-4)
    assert "No oracle better than base on toy:" in table_files(contents)["pooled.md"]
    not_begun = pd.concat([small_frame(), pd.DataFrame([hole("missing", None, task="later", method="dpg")])])
    text = table_files(read_contents(not_begun, "demo", Protocol(("dpg", "best_n4"), 0.05)))["pooled.md"]
    assert "No oracle better than base on toy:" in text, "a task without a cell is compared with nothing"


def test_a_suite_that_fixed_nothing_has_no_primary_test():
    contents = read_contents(small_frame(), "demo")
    assert contents.pooled == [] and "pooled.md" not in table_files(contents)
    found = machine_readable(framed(), suite="demo", command=COMMAND, protocol=Protocol(("dpg",), 0.05))
    assert json.loads(json.dumps(found, allow_nan=False))["pooled"][0]["rows"][0]["effect"]["mean"] == pytest.approx(0.6)
