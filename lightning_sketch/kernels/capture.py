"""Whether launches are captured into a graph."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Whether what is launched now is captured into a CUDA graph, to be replayed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
