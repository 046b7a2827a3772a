"""From the words on the command line to checked cells."""

from dpgbench.config.compose import files, presets, suites
from dpgbench.config.overrides import parse
from dpgbench.config.request import Request, checked_name, read, replay

__all__ = ["Request", "checked_name", "files", "parse", "presets", "read", "replay", "suites"]
