"""Marks of tests that need more of torch than the package does, whose oldest version is 2.6."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.torch_version import TorchVersion

adam_decouples = pytest.mark.skipif(
    "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters,
    reason="Adam of this version has no decoupled_weight_decay",
)
fake_bytes_are_indices = pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 7),
    reason="embedding of a fake CUDA tensor of uint8 asks for the device in torch 2.6",
)
