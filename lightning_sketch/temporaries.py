"""What steps of compressed layers allocate on an accelerator, beside what blocks take."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from torch import Tensor

from lightning_sketch.kernels.bags import bags_bytes
from lightning_sketch.layers.record import LayerPart, compute_dtype
from lightning_sketch.rules import alike


def live_blocks(part: LayerPart) -> int:
    """Block-sized tensors that are alive at once in a step by the reference."""
    codecs = part.layer.codecs.values()
    depth = max((getattr(codec, "depth", 0) for codec in codecs), default=0)
    return max(codec.live_blocks for codec in codecs) + max(0, depth - 3)


def bags_of(part: LayerPart, param: Tensor, blocks: int) -> int:
    """Of sketches on a CUDA device: rows sorted by bucket, and a block's sums, as large as the table."""
    shapes = {shape for codec in part.layer.persistent_codecs().values() if (shape := codec.table_shape(part.shard))}
    itemsize, rows = compute_dtype(param).itemsize, part.shard.local_rows
    hashed = [(depth, width) for depth, width in shapes if width < part.shard.table_rows]  # others are exact
    sorting = sum(bags_bytes(rows, depth, width, blocks, itemsize) for depth, width in hashed)
    return sorting + max((depth * width * part.shard.row_numel * itemsize for depth, width in hashed), default=0)


def batch_bytes(layers: Iterable[tuple[LayerPart, Tensor]], hashes: int) -> int:
    """Of layers by the reference: what the largest batch of those that are alike takes, 0 if none is.

    Args:
        hashes: bytes of row ids, buckets and signs for each row, at most.
    """
    batches: dict[Hashable, list[tuple[LayerPart, Tensor]]] = {}
    for part, param in layers:
        numel = part.shard.local_rows * part.shard.row_numel
        together = all(codec.steps_together and not codec.lazy for codec in part.layer.codecs.values())
        if numel and together and alike.pays(param.device) and alike.most_together(numel) > 1:
            kind = param.dtype, param.device, part.shard, tuple(part.layer.codecs.items())
            batches.setdefault(kind, []).append((part, param))
    largest = 0
    for members in batches.values():
        part, param = members[0]
        rows, numel = part.shard.local_rows, part.shard.local_rows * part.shard.row_numel
        count = alike.evenly(len(members), alike.most_together(numel))
        if len(members) > 1:
            states = sum(
                codec.nbytes(part.spec(state, param, {})) for state, codec in part.layer.persistent_codecs().items()
            )
            stacked = 2 * numel * param.element_size() + states
            arithmetic = live_blocks(part) * numel * compute_dtype(param).itemsize + rows * hashes
            largest = max(largest, count * (stacked + arithmetic))
    return largest
