"""list and check: what there is, and whether its rewards can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from dpgbench import config
from dpgbench.cli.words import first_comment, terminal
from dpgbench.errors import UserError
from dpgbench.registry import Registry

if TYPE_CHECKING:
    from dpgbench.check import Findings


def list_plugins(words: list[str]) -> int:
    """Every plug-in, the broken ones named, and every scale and suite."""
    given = config.parse(words)
    unknown = sorted(set(given) - {"plugins"})
    if unknown:
        raise UserError(f"{unknown[0]}: list takes no argument but plugins=DIR")
    registry = Registry(Path(str(given["plugins"][0])) if "plugins" in given else None)
    console = terminal()
    for kind in ("method", "task"):
        table = Table(f"{kind}s", "", box=None, pad_edge=False, title_justify="left")
        rows = {file.name: escape(file.summary) for file in registry.files(kind)}
        rows |= {name: escape(first_comment(path)) for name, path in config.presets(registry, kind).items()}
        rows |= {name: f"[red]unusable: {escape(says)}[/]" for name, says in registry.unusable(kind).items()}
        for name in sorted(rows):
            table.add_row(name, rows[name])
        console.print(table, highlight=False)
        console.print()
    table = Table("scales and suites", "", box=None, pad_edge=False)
    for path in sorted(config.files(registry, "scale").values()):
        table.add_row(f"scale={path.stem}", first_comment(path))
    for name, title in config.suites(registry).items():
        table.add_row(f"suite={name}", title)
    console.print(table, highlight=False)
    return 0


def check_metagradients(words: list[str]) -> int:
    """Measure how far a cell's metagradients can be trusted. Returns 0 for yes and with care, 1 for no."""
    if not words or words[0] != "metagrad":
        given = words[0] if words else "nothing"
        raise UserError(
            f"check {given}: no such check; write `check metagrad`, then task=, scale=, seed= as with run, or `check plugin plugins=DIR`"
        )
    own = ("directions=", "subsets=")
    counts = {key: values[0] for key, values in config.parse(word for word in words[1:] if word.startswith(own)).items()}
    for key, count in counts.items():
        if type(count) is not int or count < 3:
            raise UserError(f"{key}={count}: a correlation needs 3 or more; write {key}=8")
    (cell,) = config.read([word for word in words[1:] if not word.startswith(own)], sweep=False).cells
    if cell.skip:
        raise UserError(cell.skip)
    plugins = config.parse(words[1:]).get("plugins", [None])[0]
    from dpgbench.check import measure_cell

    found = measure_cell(cell.spec, Path(plugins) if plugins else None, **counts)
    console = terminal()
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in _check_rows(found):
        table.add_row(*row)
    console.print(f"{cell.spec.task.label}, scale {cell.spec.scale.name}, seed {cell.spec.seed}: {found.examples} texts, T={found.steps}")
    console.print(table, highlight=False)
    answer, reasons = found.verdict
    console.print(
        f"Can these rewards be trusted here? {answer.capitalize()}{': ' + '; '.join(reasons) if reasons else ''}.",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if answer == "no" else 0


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
