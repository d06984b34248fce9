"""``lightning-sketch presets``: list the policies that have a name (Policy.preset)."""

from __future__ import annotations

import argparse

from lightning_sketch.policy.presets import PRESETS
from lightning_sketch.text import table


def add_options(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(options: argparse.Namespace) -> str:
    """The table of all presets."""
    rows = [(name, (make.__doc__ or "").partition("\n")[0]) for name, make in PRESETS.items()]
    return table("presets", ("name", "what it keeps"), rows)
