"""docs/sharding.md says how exact every codec is under every engine, and how much lies on each rank: it is so."""

from __future__ import annotations

from typing import Any

import pytest

from tests.exactness import DOCUMENT, ENGINES, LABELS, WORDS, between, exactness, measure, one_process
from tests.ranks import run_ranks

ORDER = list(WORDS)
#: Under Shard(1) row vectors are kept whole on every rank.
WHOLE_ROWS = {("rows", "columns"), ("sm3", "columns"), ("factored", "columns"), ("sketched_rows", "columns")}


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {world_size: run_ranks(measure, world_size) for world_size in (2, 3)}


@pytest.fixture(scope="module")
def whole() -> Any:
    return one_process()


def cells(name: str) -> dict[str, list[str]]:
    """The rows of a generated table by their label."""
    lines = between(DOCUMENT.read_text(), name).splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {label: row for label, *row in rows}


@pytest.mark.distributed
def test_exactness_is_what_the_document_says(ranks, whole):
    found = exactness({world_size: results[0] for world_size, results in ranks.items()}, whole[0])
    documented = cells("exactness")
    for layer, label in LABELS.items():
        for kind, cell in zip(ENGINES, documented[label], strict=False):
            word, distance = found[layer][kind]
            said = next(w for w in reversed(ORDER) if cell.startswith(WORDS[w].split("{")[0]))
            assert ORDER.index(word) <= ORDER.index(said), (layer, kind, word, distance)
            if word == "per rank":
                assert distance <= 1.2 * float(cell.split()[-2].rstrip("%")) / 100 + 0.002, (layer, kind, distance)


@pytest.mark.distributed
def test_zero_2_is_zero_1(ranks):
    for results in ranks.values():
        for name, value in results[0]["zero2"].items():
            assert value.equal(results[0]["zero1"][name]), name


@pytest.mark.distributed
def test_every_rank_ends_with_the_same_parameters(ranks):
    for first, *others in ranks.values():
        for other in others:
            for kind in ENGINES:
                for name, value in first[kind].items():
                    assert value.equal(other[kind][name]), (kind, name)


@pytest.mark.distributed
def test_each_rank_holds_its_share_of_the_states(ranks, whole):
    for world_size, results in ranks.items():
        for kind in ENGINES:
            for layer, bytes_of_one in whole[1].items():
                for rank in results:
                    share = rank[f"{kind} bytes"][layer] / bytes_of_one
                    assert share <= 1 / world_size + 0.01 or (layer, kind) in WHOLE_ROWS, (kind, layer, share)
