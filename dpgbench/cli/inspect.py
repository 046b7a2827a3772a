"""The commands `list` (every method, task, scale and suite), `check metagrad` (whether the rewards of a cell can be trusted) and `check
estimator` (how far rewards stand for exact effects, and how much of a policy gradient is signal)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dpgbench import config
from dpgbench.cli.arguments import first_comment, inert, say, show_rows, take_format, terminal, warn_of_threads
from dpgbench.config import measured_together
from dpgbench.config.overrides import Word, one
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import CellError, UserError
from dpgbench.core.files import replacing
from dpgbench.core.text import json_text
from dpgbench.plugins.registry import Registry
from dpgbench.store import run_folder

if TYPE_CHECKING:
    from dpgbench.metagrad.diagnostics import Findings
    from dpgbench.run.check_estimator import Findings as EstimatorFindings
    from dpgbench.stats.estimator import Estimate


def list_plugins(words: list[str]) -> int:
    """Every plug-in, the broken ones named, and every scale and suite."""
    given = config.parse(words)
    unknown = sorted(set(given) - {"plugins"})
    if unknown:
        raise UserError(f"{unknown[0]}: list takes no argument but plugins=DIR")
    registry = Registry(_plugins(given))
    console = terminal()
    for kind in ("method", "task"):
        table = Table(f"{kind}s", "", box=None, pad_edge=False, title_justify="left")
        rows = {file.name: (file.summary, "") for file in registry.files(kind)}
        rows |= {name: (first_comment(path), "") for name, path in config.presets(registry, kind).items()}
        rows |= {name: (f"unusable: {says}", "red") for name, says in registry.unusable(kind).items()}
        for name in sorted(rows):
            table.add_row(Text(inert(name)), Text(inert(rows[name][0]), rows[name][1]))
        console.print(table, highlight=False)
        console.print()
    table = Table("scales and suites", "", box=None, pad_edge=False)
    for path in sorted(registry.presets("scale").values()):
        table.add_row(*map(Text, (inert(f"scale={path.stem}"), inert(first_comment(path)))))
    for name, title in config.suites(registry).items():
        table.add_row(*map(Text, (inert(f"suite={name}"), inert(title))))
    console.print(table, highlight=False)
    return 0


def check_metagradients(words: list[str]) -> int:
    """Measure how far a cell's metagradients can be trusted. Returns 0 for yes and with care, 1 for no."""
    own, given = ("directions", "subsets"), config.parse(words)
    counts = {key: given[key][0].value for key in own if key in given}
    for key, count in counts.items():
        if type(count) is not int or count < 3 or len(given[key]) > 1:
            raise UserError(f"{key}={','.join(given[key])}: a correlation needs 3 or more; write {key}=8")
    (cell,) = config.read([word for word in words if word.partition("=")[0] not in own], sweep=False).cells
    if cell.skip:
        raise UserError(cell.skip)
    warn_of_threads([cell.spec])
    from dpgbench.run.check_metagrad import measure_cell

    found = measure_cell(cell.spec, _plugins(given), **counts)
    console = terminal()
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in _check_rows(found):
        table.add_row(*row)
    say(console, f"{cell.spec.task.label}, scale {cell.spec.scale.name}, seed {cell.spec.seed}: {found.examples} texts, T={found.steps}")
    console.print(table, highlight=False)
    answer, reasons = found.verdict
    say(console, f"Can these rewards be trusted here? {answer.capitalize()}{': ' + '; '.join(reasons) if reasons else ''}.")
    return 1 if answer == "no" else 0


def check_estimators(words: list[str]) -> int:
    """Measure how far metagradients stand for exact effects, and the signal in methods' policy gradients. Returns 1 for no, else 0."""
    words, as_json = take_format(words)
    given = config.parse(words)
    request = config.read([word for word in words if word.partition("=")[0] not in ("batches", "texts")], sweep=True)
    counts = dict(measured_together.usual_counts(len(request.cells)))
    for key, usual in counts.items():
        counts[key] = count = given[key][0].value if key in given else usual
        if type(count) is not int or count < 3 or len(given.get(key, "1")) > 1:
            raise UserError(f"{key}={','.join(given[key])}: an error bar needs 3 or more; write {key}={usual}")
    for cell in request.cells:
        if cell.skip:
            raise UserError(f"method={cell.spec.method.label}: {cell.skip}")
    specs = [cell.spec for cell in request.cells]
    measured_together.check_together(specs, request.registry, **counts)
    run_folder.check_writable(request.results)
    warn_of_threads(specs)
    from dpgbench.run.check_estimator import measure_methods

    errors = Console(stderr=True)  # standard output may be JSON
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        console=errors, transient=True, disable=not errors.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("batches", total=None)
        try:
            found = measure_methods(
                specs, _plugins(given), **counts, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
        except CellError as error:
            raise UserError(str(error)) from None
    about = {
        "task": specs[0].task.label, "scale": specs[0].scale.name, "seed": specs[0].seed, "cells": [spec.folder for spec in specs],
        "generator": specs[0].scale.generator, **found.plain(),
    }  # fmt: skip
    figure = _keep_estimators(request.results, specs, counts, found, about)
    if as_json:
        print(json_text({**about, "figure": str(figure)}))
    else:
        _show_estimators(specs[0], found, figure)
        if not {"batches", "texts"} & set(given) and len(specs) >= measured_together.MANY:
            more = " ".join(f"{key}={count}" for key, count in measured_together.usual_counts(1).items())
            say(terminal(), f"{found.batches} batches, because {len(specs)} methods share the time; {more} measures as much as for one.")
    return 1 if found.verdict[0] == "no" else 0


def _keep_estimators(
    results: Path, specs: Sequence[RunSpec], counts: Mapping[str, int], found: EstimatorFindings, about: Mapping[str, object]
) -> Path:
    """The numbers and the figure, under the results folder's `checks`; the name says what was measured. Returns the figure's path."""
    from dpgbench.report.estimator_figure import draw_estimators

    which = hashlib.sha256(repr((*(spec.hash for spec in specs), sorted(counts.items()))).encode()).hexdigest()[:10]
    path = results / "checks" / f"estimator.{specs[0].task.label}.s{specs[0].seed}.{which}.png"
    with replacing(path.with_suffix(".json")) as partial:
        partial.write_text(json_text(about) + "\n", encoding="utf-8")
    title = f"{specs[0].task.label}, scale {specs[0].scale.name}, seed {specs[0].seed}"
    ratios = [(method.label, method.snr.value, method.snr.error) for method in found.methods]
    with replacing(path) as partial:
        draw_estimators(str(partial), title, found.pairs.reward_K, found.pairs.effect_K, ratios)
    return path


def _show_estimators(spec: RunSpec, found: EstimatorFindings, figure: Path) -> None:
    console = terminal()
    say(
        console,
        f"{spec.task.label}, scale {spec.scale.name}, seed {spec.seed}: {found.batches} batches of {found.texts} texts, T={found.steps}; "
        f"{found.left_out} of them left out in turn",
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in (
        ("correlation", _measured(found.pearson, 3), "of a text's metagradient with the exact effect of leaving it out"),
        ("slope", _measured(found.slope, 2), "effect per unit of metagradient; 1: the derivative is the effect"),
        ("bias share", _measured(found.bias_share, 2), "of the squared error, common to all texts; an advantage's baseline removes it"),
        ("gradient bias", _measured(found.gradient_bias, 3), "of the mean policy gradient paid in metagradients: |error|² / |exact|²"),
    ):  # fmt: skip
        table.add_row(*row)
    console.print(table, highlight=False)
    console.print()
    rows = [
        [
            method.label,
            _measured(method.pearson, 3),
            _measured(method.snr, 3),
            _measured(method.cosine, 2),
            f"{method.texts_for_snr_1:.0f}" if method.snr.resolved else f"{method.fewest_texts:.0f} or more",
        ]
        for method in found.methods
    ]
    show_rows(console, ["method", "correlation", "signal to noise", "cosine to exact", "texts for SNR 1"], rows)
    console.print()
    answer, reasons = found.verdict
    say(console, f"Can a metagradient stand for a text's effect here? {answer.capitalize()}{': ' + '; '.join(reasons) if reasons else ''}.")
    say(console, f"figure: {figure}")


def _measured(estimate: Estimate, digits: int) -> str:
    """A value with its standard error; a dash where the data do not determine it."""
    if math.isnan(estimate.value):
        return "-"
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


def _plugins(given: Mapping[str, list[Word]]) -> Path | None:
    folder = one(given, "plugins")
    return None if folder is None else Path(folder)


def _check_rows(found: Findings) -> list[tuple[str, str, str]]:
    """What was measured, its value, what it means."""
    rows = [
        ("finite differences", f"{found.fd_correlation:.6f}", f"correlation with the exact derivative; largest error {found.fd_error:.1e}"),
        ("rounding", f"{found.rounding:.6f}", "correlation of the rewards with float64 ones"),
        ("linear datamodelling score", f"{found.lds:.3f}", "rank correlation of predicted and actual Phi, half of the texts left out"),
        ("metasmoothness", f"{found.metasmoothness:.3f}", "1: parameters move in proportion to the weights' change; 0: at random"),
    ]
    if found.saturation is not None:
        said = f"of AdamW's first step is a sign, at eps_root={found.eps_root:.0e}; suggested {found.suggested_eps_root:.0e} or more"
        rows.append(("saturation", f"{found.saturation:.3f}", said))
    if found.bf16_correlation is not None:
        rows.append(("bfloat16", f"{found.bf16_correlation:.4f}", "correlation of the rewards with float32 ones"))
    rows.append(("cost", f"{found.cost:.2f}", f"times training alone; steps by {', '.join(dict.fromkeys(found.modes))}"))
    return rows
