"""A process that asks for memory: ``python -m tests.allocate KIND BYTES``; see test_memory_cap.py."""

from __future__ import annotations

import sys

from benchmarks.memory_cap import answer


def main(kind: str, count: int) -> dict[str, int]:
    if kind == "fails":
        raise RuntimeError("something else went wrong")
    if kind == "torch":
        import torch

        return {"bytes": torch.ones(count, dtype=torch.uint8).nbytes}
    return {"bytes": len(bytearray(count))}


if __name__ == "__main__":
    answer(lambda: main(sys.argv[1], int(sys.argv[2])))
