"""Kinds and fields are listed once: a library made from other lists is refused, and so is a kind that is unknown."""

from __future__ import annotations

import re
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sketch.kernels import cpu, fields, native
from lightning_sketch.kernels.fields import STATE, STATES, STEP, Field, Kind, Source
from lightning_sketch.kernels.schema import FusedStep, KernelState, state_numbers, step_numbers

TYPES = st.sampled_from(["int32_t", "int64_t", "uint64_t", "float", "void*"])


def test_every_field_of_a_step_has_a_value_in_python() -> None:
    state = KernelState(
        Kind.SKETCH, torch.zeros(2, 5, 3), decay=0.5, weight=0.25, scale=2.0, depth=2, width=5, seed=7, floor=3.0
    )
    step = FusedStep(torch.zeros(4, 3), torch.zeros(2, 3), torch.tensor([1, 3]), 0, 0, state, None, None, 0.1)
    names = [field.name for field in STEP if field.source == Source.STEP and not field.is_address]
    assert len(step_numbers(step)) == len(names)
    said = dict(zip(names, step_numbers(step), strict=True))
    assert (said["rows"], said["columns"], said["all_rows"], said["use_bound"], said["lr"]) == (2, 3, False, False, 0.1)
    assert state_numbers(state) == (5, 7, 0.5, 0.25, 0.0, 2.0, 3.0)


@pytest.mark.parametrize("listed", [STATE, STEP])
def test_fields_of_one_source_lie_together(listed: tuple[Field, ...]) -> None:
    sources = [field.source for field in listed]
    assert sources == sorted(sources, key=list(Source).index)
    assert len({field.name for field in listed}) == len(listed)


@given(st.lists(TYPES, min_size=1, max_size=12), st.integers(0, 12))
def test_offsets_are_the_compilers(types: list[str], split: int) -> None:
    """The header asserts it of the structures that are; this of others: each type is aligned to its own size."""
    listed = tuple(
        Field(f"f{i}", type_, Source.LAYOUT if i < split else Source.STEP, False) for i, type_ in enumerate(types)
    )
    at = 0
    for field in listed:
        width = struct.calcsize(field.code)
        at += -at % width
        assert fields.offset(listed, field.name) == at
        at += width
    assert at <= fields.size(listed) < at + 8


def test_the_header_says_where_every_field_is() -> None:
    header = fields.c_header()
    assert len(re.findall(r"static_assert\(offsetof", header)) == len(STATE) + len(STEP)
    assert all(f"    {kind.name} = {int(kind)}," in header for kind in Kind)


def test_a_library_made_from_other_lists_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    native.why_not.cache_clear()
    fields.version.cache_clear()
    assert native.why_not() is None
    monkeypatch.setattr(fields, "STEP", (*STEP, Field("further", "float", Source.DRIVER, False)))
    native.why_not.cache_clear()
    fields.version.cache_clear()
    assert "another version" in str(native.why_not())
    monkeypatch.undo()
    native.why_not.cache_clear()
    fields.version.cache_clear()


@pytest.mark.parametrize(("name", "kind"), [("first", Kind.ROW), ("momentum", Kind.SKETCH), ("second", 10)])
def test_an_unknown_kind_is_taken_for_no_other_one(name: str, kind: int) -> None:
    states: dict[str, KernelState | None] = dict.fromkeys(STATES)
    states[name] = KernelState(kind, torch.zeros(4, 3))  # type: ignore[arg-type]
    param = torch.ones(4, 3)
    step = FusedStep(param, torch.ones(4, 3), None, 0, 0, *states.values(), 0.1)
    with pytest.raises(RuntimeError, match="refused a step"):
        cpu.step([step])
    assert (param == 1).all()
