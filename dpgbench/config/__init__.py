"""From the words on the command line to checked cells."""

from dpgbench.config.compose import presets, protocol_of, suites
from dpgbench.config.overrides import parse
from dpgbench.config.request import Request, checked_name, read, replay

__all__ = ["Request", "checked_name", "parse", "presets", "protocol_of", "read", "replay", "suites"]
