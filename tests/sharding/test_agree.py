"""What all ranks decide alike."""

from __future__ import annotations

import functools

import pytest

from lightning_sketch.sharding.agree import any_rank
from tests.ranks import run_ranks

WORLD = 4


def answers(rank, world_size):
    """What any_rank says when one rank differs, and when one raises."""

    def asked(decide):
        try:
            return any_rank(decide)
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def unreadable():
        if rank == 2:
            raise PermissionError("rank 2 may not read it")
        return True

    return {"no": asked(lambda: False), "one": asked(lambda: rank == 3), "raised": asked(unreadable)}


@functools.cache
def ranks():
    return run_ranks(answers, WORLD)


@pytest.mark.distributed
def test_all_ranks_go_the_same_way():
    for rank, found in enumerate(ranks()):
        assert (found["no"], found["one"]) == (False, True)
        kind = "PermissionError" if rank == 2 else "ValueError"  # the rank that failed shows its own error
        assert found["raised"] == f"{kind}: rank 2 may not read it"
