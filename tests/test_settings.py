"""The settings an editor knows are those that the YAML files have, of the types they have there."""

from __future__ import annotations

from typing import get_type_hints

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from dpgbench.core.settings import Lora, Policy, Scale, Training


@pytest.mark.parametrize("scale", [path.stem for path in sorted((ROOT / "configs" / "scale").glob("*.yaml"))])
def test_annotations_are_what_every_scale_sets(scale):
    """Name by name; a value's type is one of those annotated, an int where a float is meant among them."""
    sections = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "scale" / f"{scale}.yaml"))
    sections["lora"] = sections["policy"]["lora"]
    for name, kind in (("scale", Scale), ("training", Training), ("policy", Policy), ("lora", Lora)):
        hints = get_type_hints(kind)
        assert set(hints) == set(sections[name]), name
        for setting, value in sections[name].items():
            annotated = [getattr(one, "__origin__", one) for one in getattr(hints[setting], "__args__", None) or [hints[setting]]]
            if not isinstance(hints[setting], type) and getattr(hints[setting], "__origin__", None) is list:
                annotated = [list]
            allowed = tuple({float: (float, int), Lora: dict}.get(one, one) for one in annotated)
            flat = tuple(one for entry in allowed for one in (entry if isinstance(entry, tuple) else (entry,)))
            assert isinstance(value, flat), f"{name}.{setting}={value!r} is not {hints[setting]}"
