"""``lightning-sketch plan``: what a policy would do to a model's optimizer states, in bytes, before training.

The model is made on the meta device: nothing is allocated, whatever its size.
"""

from __future__ import annotations

import argparse
import json
from typing import get_args

from lightning_sketch.cli.arguments import batch_of, dtype_of, model_of, optimizer_of, policy_of
from lightning_sketch.estimate import Engine, estimate_memory


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="transformers:CONFIG, a Hugging Face config.json or its folder; or MODULE:FUNCTION, which returns it",
    )
    parser.add_argument(
        "--optimizer",
        default="adamw",
        help='of torch.optim, "adamw" or "sgd(momentum=0.9)"; or MODULE:CLASS (default adamw)',
    )
    parser.add_argument(
        "--policy", default="tables", help="a preset, a YAML file, or budget:24GiB for all states (default tables)"
    )
    parser.add_argument("--engine", choices=get_args(Engine), default="ddp", help="divides the model (default ddp)")
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks (default 1)")
    parser.add_argument("--dtype", default="float32", help="of the parameters: float32, bf16, ... (default float32)")
    parser.add_argument(
        "--batch", help="of each rank, to count activations too: 8x2048 is 8 sequences of 2,048 input ids and labels"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every layer and every rank")


def run(options: argparse.Namespace) -> str:
    """The tables, or JSON."""
    model = model_of(options.model).to(dtype_of(options.dtype))
    optimizer = optimizer_of(options.optimizer, model)
    policy = policy_of(options.policy, model, optimizer)
    batch = None if options.batch is None else batch_of(options.batch)
    found = estimate_memory(model, optimizer, policy, engine=options.engine, world_size=options.world_size, batch=batch)
    return json.dumps(found.to_dict(), indent=1) if options.json else str(found)
