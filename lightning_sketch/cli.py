"""``lightning-sketch``: convert checkpoints, and list presets, on the command line."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lightning_sketch.checkpoints.rewrite import Conversion, convert_checkpoint
from lightning_sketch.policy.policy import Policy
from lightning_sketch.policy.presets import PRESETS
from lightning_sketch.text import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="lightning-sketch", description="Optimizer-state compression for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser(
        "convert",
        help="rewrite a checkpoint's optimizer states",
        description="Rewrite the optimizer states of a checkpoint: a torch or Lightning file, a "
        "torch.distributed.checkpoint directory, or a DeepSpeed directory (which becomes a file). Everything else in "
        "it is copied. The relative error of every state that had to be encoded anew is printed.",
    )
    convert.add_argument("source", help="the checkpoint")
    convert.add_argument("destination", help="where to write; must not exist")
    convert.add_argument("--to", choices=("plain", "compressed"), required=True, help="form of the states")
    convert.add_argument("--policy", help="YAML file of a policy (with --to compressed); default: as it was written")
    convert.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="returns the model, which a policy needs; called on the meta device"
    )
    convert.add_argument("--world-size", type=int, default=1, help="FSDP2 ranks that will load it (default 1)")
    convert.add_argument("--dtype", default="float32", help="of the parameters, for plain states (default float32)")
    commands.add_parser("presets", help="list the policies that have a name (Policy.preset)")
    options = parser.parse_args(arguments)
    if options.command == "presets":
        print(
            table("presets", ("name", "what it keeps"), [(name, _first_line(make)) for name, make in PRESETS.items()])
        )
        return 0
    try:
        done = _convert(options)
    except (OSError, ValueError) as error:
        print(f"lightning-sketch: {error}", file=sys.stderr)
        return 1
    print(done)
    return 0


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def _convert(options: argparse.Namespace) -> Conversion:
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype {options.dtype}: not a torch dtype")
    if options.world_size < 1:
        raise ValueError(f"--world-size {options.world_size}: must be at least 1")
    return convert_checkpoint(
        options.source,
        options.destination,
        to=options.to,
        policy=Policy.from_yaml(options.policy) if options.policy else None,
        model=_model(options.model) if options.model else None,
        world_size=options.world_size,
        dtype=dtype,
    )


def _model(reference: str) -> nn.Module:
    module, _, function = reference.partition(":")
    sys.path.insert(0, "")  # a script beside the user, as python -m has it
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {reference}: {error}") from error
    with torch.device("meta"):
        model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {reference}: returned a {type(model).__name__}, not a module")
    return model
