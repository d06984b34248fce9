"""The matrix covers everything that is registered."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_sketch import Codec, Keep
from lightning_sketch.rules.families import FAMILIES
from tests.codecs.halves import Halves
from tests.conformance import cases
from tests.conformance.cases import DENSITIES, LAYOUTS, OPTION_SETS, VARIANTS, excluded, matrix


def test_every_registered_codec_is_in_an_option_set() -> None:
    # Tests of benchmarks import codecs of theirs, which do what others' code does.
    ours = {cls for cls in Codec.registry.values() if not cls.__module__.startswith("benchmarks.")}
    assert {cls.__name__ for cls in ours - OPTION_SETS.keys()} == set()


def test_option_sets_are_of_registered_codecs() -> None:
    for cls, sets in OPTION_SETS.items():
        assert Codec.registry[cls.__name__] is cls
        assert sets
        assert {type(variant.codec) for variant in sets.values()} == {cls}


def test_a_codec_that_is_registered_later_is_there_with_its_defaults() -> None:
    @dataclass(frozen=True)
    class Later(Halves):
        pass

    try:
        assert cases.variants()["Later"].codec == Later()
    finally:
        del Codec.registry["Later"]


def test_every_optimizer_with_a_rule_is_a_family() -> None:
    assert {cls for name, (cls, _) in cases.FAMILIES.items() if name != cases.NADAM} == FAMILIES.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_codec_has_a_cell_in_every_density_and_layout_it_can(variant: str) -> None:
    mine = {
        (case.density, case.layout) for case in matrix(*DENSITIES, layouts=tuple(LAYOUTS)) if case.variant == variant
    }
    assert mine == {(d, x) for d in DENSITIES for x in LAYOUTS} - {
        ("sparse", x) for x in ("flat segment", "column shard", "vector")
    }


def test_a_cell_that_is_left_out_says_why() -> None:
    assert excluded(VARIANTS["SM3"], "sgd") == "the family has no state that the codec may hold"
    assert not excluded(VARIANTS["Keep"], "sgd")
    assert isinstance(VARIANTS["Keep"].codec, Keep)
