"""``lightning-sketch``: what a user asks on the command line; a file for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_sketch.cli import convert, doctor, plan, presets

COMMANDS = {"plan": plan, "presets": presets, "doctor": doctor, "convert": convert}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="lightning-sketch", description="Optimizer-state compression for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").removeprefix(f"``lightning-sketch {name}``: ")
        first, _, rest = text.partition("\n\n")
        description = f"{first[0].upper()}{first[1:]} {rest}".strip()
        module.add_options(commands.add_parser(name, help=first.rstrip("."), description=description))
    options = parser.parse_args(arguments)
    try:
        print(COMMANDS[options.command].run(options))
    except (OSError, ValueError, TypeError) as error:
        print(f"lightning-sketch: {error}", file=sys.stderr)
        return 1
    return 0
