"""The commands `list` (every method, task, scale and suite) and `check metagrad` (whether the rewards of a cell can be trusted)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dpgbench import config
from dpgbench.cli.arguments import first_comment, inert, say, terminal, warn_of_threads
from dpgbench.config.overrides import Word, one
from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry

if TYPE_CHECKING:
    from dpgbench.metagrad.diagnostics import Findings


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
    for path in sorted(config.files(registry, "scale").values()):
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
