"""Steps of many layers in a few launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import FusedStep, Observed
from lightning_sketch.kernels.triton.host_table import GRAD_WORD, Group, Table, laid_of, pack
from lightning_sketch.kernels.triton.layout import GROUP, ceil
from lightning_sketch.kernels.triton.table import PROGRAMS, SCRATCH


def step(layers: Sequence[FusedStep]) -> Tensor:
    """Perform the steps of all `layers`, which are on one device (their parameters and states modified in place).

    Returns:
        how many rows (elements where all states are element-wise) of each were left out, int64 ``[len(layers)]`` on the
        device, for which it does not wait.
    """
    table = Table(layers)
    left_out = table.launch()
    changed = [layer.param for layer in layers]
    for layer in layers:
        changed += layer.tensors()
    increment_version(changed)  # kernels write through addresses, of which autograd knows nothing
    if (cache := layers[0].cache) is not None:
        cache.program = _Program(layers, table) if table.repeats else None
    return left_out


def observe_gradients(layers: Sequence[FusedStep]) -> list[Observed]:
    """What the gradients of all `layers`, which are on one device, add to sums; see `schema.observation`."""
    device = layers[0].param.device
    found = [
        Observed(
            torch.zeros(layer.grad.shape[0], dtype=torch.float32, device=device),
            torch.zeros(layer.grad.shape[1:].numel(), dtype=torch.float32, device=device)
            if _has_columns(layer)
            else None,
        )
        if layer.grad.numel() == 0
        else None
        for layer in layers
    ]
    table = Table(layers)
    scratch = table.observe()
    for number, laid, (means, _, _, groups, *_) in zip(table.numbers, table.laid, table.places, strict=True):
        layer = layers[number]
        rows, columns = layer.rows, layer.columns
        sums = None
        if _has_columns(layer):
            count = ceil(laid.blocks, GROUP)
            sums = scratch[groups : groups + count * columns].view(count, columns)
            sums = sums[0] if count == 1 else sums.sum(dim=0)
        found[number] = Observed(scratch[means : means + rows], sums)
    return [each for each in found if each is not None]


def _has_columns(layer: FusedStep) -> bool:
    return layer.second is not None and layer.second.kind == Kind.FACTORED


class _Program:
    """A `Program` of the layers of a table."""

    def __init__(self, layers: Sequence[FusedStep], table: Table) -> None:
        self.kernel = step
        self.addresses, self._table = [layer.addresses() for layer in layers], table
        self._keys = {number: key for key, group in table.groups.items() for number in _numbers(table, group)}

    def follow(self, leaders: Sequence[int]) -> None:
        numbers, words = self._table.numbers, self._table.words
        assert words is not None
        rows = {number: row for row, number in enumerate(numbers)}
        words.follow([rows[leaders[number]] for number in numbers])
        leading = sorted(set(leaders))
        self._leading = leading
        self._in_rows = sorted(range(len(leading)), key=lambda i: rows[leading[i]])  # steps, in the order of the table

    def takes(self, steps: Sequence[FusedStep], grads: Sequence[Tensor]) -> bool:
        if any(laid_of(step).key != self._keys[number] for number, step in zip(self._leading, steps, strict=True)):
            return False
        keys = self._keys
        return all(grad.data_ptr() % 16 == 0 or not keys[number].aligned for number, grad in enumerate(grads))

    def again(
        self, steps: Sequence[FusedStep], params: list[Tensor], grads: list[Tensor], states: list[Tensor]
    ) -> Tensor:
        table, words, packed = self._table, self._table.words, bytearray()
        assert words is not None
        for i in self._in_rows:
            packed += pack(steps[i], laid_of(steps[i]), _NO_SCRATCH, [None, None], _NO_PROGRAMS)
        words.write(packed)
        words.rows[:, GRAD_WORD] = torch.tensor([grads[number].data_ptr() for number in table.numbers], device="cpu")
        left_out = table.launch()
        increment_version(params + states)
        return left_out


def _numbers(table: Table, group: Group) -> list[int]:
    return table.numbers[group.begin : group.begin + group.count]


_NO_SCRATCH, _NO_PROGRAMS = (0,) * len(SCRATCH), [0] * len(PROGRAMS)
