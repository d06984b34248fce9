"""What all ranks do together when they restore: each verifies a share of the files, and all succeed or none does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from lightning_sketch.checkpoints.integrity import Piece, fingerprint, share, verify
from lightning_sketch.sharding.agree import gather_objects

T = TypeVar("T")


def run_on_all_ranks(function: Callable[[], T]) -> T:
    """Call a function on every rank; if it raises on one, all raise. Collective, unless there is a single process.

    Raises:
        ValueError: it raised on another rank; the message says which, and why.
    """
    result: T | None = None
    problem: Exception | None = None
    try:
        result = function()
    except Exception as error:  # whatever it is: the other ranks are waiting for a word
        problem = error
    said = gather_objects(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for rank, words in enumerate(said):
        if words is not None:
            raise ValueError(f"rank {rank} could not read the checkpoint, so no rank restores it. {words}")
    return result  # type: ignore[return-value]


def verify_together(pieces: Sequence[Piece]) -> None:
    """Compare the checksums of all pieces, every one on one of the ranks that see the same files. Collective.

    Raises:
        ValueError: on all ranks, if one is wrong; the message names the file.
    """
    prints = gather_objects(run_on_all_ranks(lambda: fingerprint(pieces)))
    rank = dist.get_rank() if len(prints) > 1 else 0
    # Ranks with files of their own, on a node's disk for instance, share with nobody else.
    team = [other for other, theirs in enumerate(prints) if theirs == prints[rank]]
    run_on_all_ranks(lambda: verify(share(pieces, team.index(rank), len(team))))
