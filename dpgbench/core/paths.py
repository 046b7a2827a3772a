"""Where the files are that come with the package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # dpgbench/ itself


def home() -> Path:
    """The folder that holds `methods/`, `tasks/` and `configs/`: the repository, or `dpgbench/bundled` in an installed wheel."""
    bundled = PACKAGE / "bundled"
    return bundled if bundled.is_dir() else PACKAGE.parent
