from __future__ import annotations

import pytest

from lightning_sketch import CountSketch, Policy, Rule
from tests.tiny import EXACT


@pytest.fixture
def exactly(monkeypatch):
    """A policy whose codec stores states exactly, and in another form: what a step makes of it is torch's, bit for bit.

    A sketch that is wider than the table stores it as it is; here it passes for an element-wise codec.
    """
    monkeypatch.setattr(CountSketch, "elementwise", True)
    return Policy([Rule(name=["table.*", "hidden.*"], first_moment=EXACT, second_moment=EXACT)])
