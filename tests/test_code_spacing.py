"""docs/design.md has the measured errors of other spacings, and the package's is the one that it says."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.code_spacing import PAGE, SPACINGS, Codes, table
from benchmarks.pages import stale_tables
from benchmarks.summary import RESULTS
from lightning_sketch import Quantized
from lightning_sketch.codecs import decode, encode
from tests.codecs.harness import make_spec


def test_the_document_has_the_measured_table():
    shown = table(json.loads((RESULTS / "code_spacing.json").read_text())["cases"])
    assert stale_tables(PAGE, {"code_spacing": shown}) == []


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_package_has_codes_by_the_root(bits, signed):
    spec = make_spec((64, 128), signed=signed)
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    values = decode(Quantized(bits=bits), spec, encode(Quantized(bits=bits), spec, x if signed else x.square()))
    codes = Codes(bits, SPACINGS["root"], signed=signed, zero=signed)
    largest = values.abs().amax(1, keepdim=True)
    grid = (torch.arange(codes.lowest, codes.largest + 1) / codes.largest).square()
    assert ((values.abs() / largest)[..., None] - grid).abs().amin(-1).max() < 1e-6
    assert len(grid) == 1 << (bits - signed)


@pytest.mark.parametrize("name", SPACINGS)
def test_codes_keep_the_expectation(name):
    codes = Codes(8, SPACINGS[name], signed=True, zero=True)
    torch.manual_seed(0)
    values = torch.rand(1, 128)
    found = torch.stack([codes.rounded(values) for _ in range(4000)]).mean(0)
    assert (found - values).abs().max() < 0.02 * values.max()
