"""benchmarks/memory_cap.py: a limit that the system enforces, and the largest size below it."""

from __future__ import annotations

import pytest

from benchmarks.memory_cap import MIB, largest, needs_of, run_capped


def allocate(kind: str, count: int, cap: int | None) -> dict[str, int] | None:
    return run_capped("tests.allocate", [kind, str(count)], cap=cap)


def test_a_child_below_its_cap_answers():
    assert allocate("python", 100 * MIB, cap=256 * MIB) == {"bytes": 100 * MIB}


@pytest.mark.parametrize("kind", ["python", "torch"])
def test_a_child_that_exceeds_its_cap_is_said_to(kind):
    assert allocate(kind, 4096 * MIB, cap=1024 * MIB) is None


def test_any_other_failure_is_an_error_with_the_childs_message():
    with pytest.raises(RuntimeError, match="something else went wrong"):
        allocate("fails", 1, cap=256 * MIB)


def test_a_child_without_a_cap_that_gets_no_memory_is_an_error():
    with pytest.raises(RuntimeError, match="ended with"):
        allocate("python", 2**60, cap=None)


@pytest.mark.parametrize("threshold", [1, 2, 7, 64, 999])
@pytest.mark.parametrize("start", [1, 10, 64, 5_000])
def test_bisection_finds_the_threshold(threshold, start):
    assert largest(lambda size: size <= threshold, start=start, precision=0) == threshold


def test_bisection_finds_that_nothing_fits():
    assert largest(lambda size: False, start=50) == 0


def test_a_good_guess_takes_few_tries_to_a_fiftieth():
    tried: list[int] = []
    found = largest(lambda size: tried.append(size) or size <= 3_000, start=2_900)  # type: ignore[func-returns-value]
    assert 0.98 * 3_000 <= found <= 3_000
    assert len(tried) <= 4


def test_needs_are_those_of_the_peak():
    nothing = needs_of(lambda: None)
    needed = needs_of(lambda: len(bytearray(64 * MIB)))
    assert 63 * MIB <= needed - nothing <= 70 * MIB
