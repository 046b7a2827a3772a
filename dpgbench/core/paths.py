"""Where the files are that come with the package."""

from __future__ import annotations

from pathlib import Path


def home() -> Path:
    """The folder that holds `methods/`, `tasks/` and `configs/`: the repository, or `dpgbench/bundled` in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "bundled"
    return bundled if bundled.is_dir() else package.parent
