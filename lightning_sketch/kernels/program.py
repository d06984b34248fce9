"""Steps of many layers as kernels read them, made again with other gradients and numbers.

To say a step of a small layer in numbers takes longer than to make it. Layers that are stored alike, and stepped by the
same hyperparameters since the same time, have the same numbers: one of them leads, and the others follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_sketch.kernels.schema import FusedStep


class Program(Protocol):
    """A step of all rows of some layers.

    Attributes:
        kernel: what made it, a `FusedKernel`.
        addresses: of each layer, see `FusedStep.addresses`.
    """

    kernel: Callable[[Sequence[FusedStep]], Tensor]
    addresses: list[list[int]]

    def follow(self, leaders: Sequence[int]) -> None:
        """Have layers take the numbers of others.

        Args:
            leaders: for each layer the one that it follows, of the same shapes and kinds; itself, if it leads.
        """

    def takes(self, steps: Sequence[FusedStep], grads: Sequence[Tensor]) -> bool:
        """Whether these steps of the layers that lead, and these gradients of all, go with what is kept."""

    def again(
        self, steps: Sequence[FusedStep], params: list[Tensor], grads: list[Tensor], states: list[Tensor]
    ) -> Tensor:
        """Perform the step (params and states modified in place).

        Args:
            steps: of the layers that lead, in order.
            params, grads: of all layers, laid out as they were.
            states: of all layers, one behind the other, at the same addresses.

        Returns:
            as a `FusedKernel` does.
        """


class Words:
    """A row of words for each layer of a program.

    Args:
        packed: the rows, one behind the other.
        count: how many.
        numbers: which words of 32 bits of a row are numbers of a step.
        seeds: which words of 64 bits are seeds. Those of noise count steps, and those of hashes stay.
    """

    def __init__(self, packed: bytearray, count: int, numbers: Sequence[int], seeds: Sequence[int]) -> None:
        self.rows = torch.frombuffer(packed, dtype=torch.int64).view(count, -1)  # [count, words]
        self._numbers = torch.zeros(2 * self.rows.shape[1], dtype=torch.bool, device="cpu")
        self._numbers[list(numbers)] = True
        self._seeds = torch.tensor(seeds, device="cpu")

    def follow(self, leaders: Sequence[int]) -> None:
        """See `Program.follow`; rows for layers."""
        leading = sorted(set(leaders))
        place = {leader: i for i, leader in enumerate(leading)}
        self._leading = torch.tensor(leading, device="cpu")
        self._place = torch.tensor([place[leader] for leader in leaders], device="cpu")

    def write(self, packed: bytearray) -> None:
        """Write the numbers of a step in all rows, as a new tensor.

        Args:
            packed: rows of those that lead, in order. Only numbers and seeds of them count.
        """
        new = torch.frombuffer(packed, dtype=torch.int64).view(len(self._leading), -1)
        further = new[:, self._seeds] - self.rows[self._leading][:, self._seeds]
        numbers = new.view(torch.int32).index_select(0, self._place)
        self.rows = numbers.where(self._numbers, self.rows.view(torch.int32)).view(torch.int64)
        self.rows[:, self._seeds] += further.index_select(0, self._place)
