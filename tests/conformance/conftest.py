from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _in_tmp_path() -> None:
    """Nothing here writes files: a folder for each of thousands of tests would take longer than they do."""
