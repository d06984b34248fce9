"""``lightning-sketch convert``: rewrite a checkpoint's optimizer states.

A checkpoint is a torch or Lightning file, a torch.distributed.checkpoint directory, or a DeepSpeed directory (which
becomes a file). Everything else in it is copied. The relative error of every state that had to be encoded anew is
printed.
"""

from __future__ import annotations

import argparse

from lightning_sketch.checkpoints.rewrite import convert_checkpoint
from lightning_sketch.cli.arguments import dtype_of, model_of, named_policy


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the checkpoint")
    parser.add_argument("destination", help="where to write; must not exist")
    parser.add_argument("--to", choices=("plain", "compressed"), required=True, help="form of the states")
    parser.add_argument("--policy", help="a preset or a YAML file (with --to compressed); default: as it was written")
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="returns the model, which a policy needs; called on the meta device (or transformers:CONFIG)",
    )
    parser.add_argument("--world-size", type=int, default=1, help="FSDP2 ranks that will load it (default 1)")
    parser.add_argument("--dtype", default="float32", help="of the parameters, for plain states (default float32)")


def run(options: argparse.Namespace) -> str:
    """Convert, and say what was done."""
    if options.world_size < 1:
        raise ValueError(f"--world-size {options.world_size}: must be at least 1")
    done = convert_checkpoint(
        options.source,
        options.destination,
        to=options.to,
        policy=named_policy(options.policy) if options.policy else None,
        model=model_of(options.model) if options.model else None,
        world_size=options.world_size,
        dtype=dtype_of(options.dtype),
    )
    return str(done)
