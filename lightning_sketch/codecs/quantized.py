"""States in 8 or 4 bits, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sketch.codecs.base import Codec, CodecState, Count, Entry, Number, StateSpec, Tensors
from lightning_sketch.codecs.rounding import noise_seed, rounding_noise
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import MOST_BLOCK, KernelState
from lightning_sketch.sharding import Block, Shard
from lightning_sketch.sharding.base import BLOCK_NUMEL

#: Blocks whose largest magnitude is below float32's smallest normal number are stored as zeros.
TINY = torch.finfo(torch.float32).tiny
#: Random bits of a rounding. With more, a number that lies on a code but for an error of arithmetic could leave it.
NOISE_BITS = 13


@dataclass(frozen=True)
class Quantized(Codec):
    r"""Store the state in 8 or 4 bits an element, and one float32 for every block: its largest magnitude `a`.

    Codes are spaced by the square root. Signed states (first moments) have a sign and a magnitude c, and mean
    :math:`\pm a (c / C)^2` with C = 127 (7): the many elements that are small beside the block's largest keep some
    digits. Non-negative states (second moments) mean :math:`a ((c + 1) / C)^2` with C = 256 (16), so that their root,
    which updates are divided by, is spaced evenly, and none becomes 0 while another of its block is not: an update that
    divides by a lost second moment would explode. A block of zeros means exactly 0.

    Rounding is stochastic and keeps the expectation exact, by the noise of `BFloat16`: the same on all replicas, and
    without generator state. An update goes by the state before it is rounded. What lies on codes stays there when it
    is encoded anew, bit for bit.

    Blocks run along a row, flattened; the last of a row may be shorter. So row shards and sparse gradients cut none.
    Where columns are sharded, or DeepSpeed cuts a row, blocks begin with what is held here. So do those of a parameter
    of one dimension, which run along it. Then shards hold bit for bit what one process would only where every cut falls
    between blocks.

    Args:
        bits: 8 or 4.
        block: elements of a block, a power of two.

    Raises:
        ValueError: an option is out of range.

    References:
        Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, ICLR 2022, https://arxiv.org/abs/2110.02861;
        Li et al., *Memory Efficient Optimizers with 4-bit States*, NeurIPS 2023, https://arxiv.org/abs/2309.01507
    """

    elementwise: ClassVar[bool] = True

    bits: int = 8
    block: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"Quantized(bits={self.bits}): must be 8 or 4")
        if not 16 <= self.block <= BLOCK_NUMEL or self.block & (self.block - 1):
            raise ValueError(f"Quantized(block={self.block}): must be a power of two from 16 to {BLOCK_NUMEL}")

    def allocate(self, spec: StateSpec) -> dict[str, Any]:
        shard = spec.shard
        rows, columns = (1, shard.table_rows) if _is_vector(shard) else (shard.local_rows, shard.table_columns)
        shape = () if _is_vector(shard) else (rows,)
        codes = torch.zeros(*shape, self.bytes_of(columns), dtype=torch.uint8, device=spec.device)
        if spec.fill:
            codes.fill_(255)  # the largest code of 8 bits, twice that of 4
        return {"codes": codes, "absmax": spec.zeros(*shape, -(-columns // self.block), dtype=torch.float32)}

    def bytes_of(self, count: int) -> int:
        """Bytes of the codes of so many elements side by side."""
        return -(-count * self.bits // 8)

    def axes(self, ndim: int) -> dict[str, tuple[int | None, ...]]:
        along: tuple[int | None, ...] = (None,) if ndim == 1 else (0, None)
        return {"codes": along, "absmax": along}

    def bind(self, spec: StateSpec, tensors: Tensors) -> CodecState:
        return (_Vector if _is_vector(spec.shard) else _Rows)(spec, tensors, self)


class _Quantized(CodecState):
    adds_values: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True
    can_follow: ClassVar[bool] = True

    codes = Entry("codes")  # rows: [local_rows, bytes]; vector: [bytes]
    absmax = Entry("absmax")  # rows: [local_rows, blocks]; vector: [blocks]
    decay: Number
    weight: Number
    seed: Any  # of the step's noise

    def __init__(self, spec: StateSpec, tensors: Tensors, codec: Quantized) -> None:
        super().__init__(spec, tensors)
        self.codec = codec
        levels = 1 << (codec.bits - spec.signed)
        self.largest = levels - 1 if spec.signed else levels  # C of the class above

    def begin(self, *, decay: Number, weight: Number, step: Count, rows: Tensor | None) -> None:
        self.decay, self.weight, self.seed = decay, weight, noise_seed(self.spec, step)

    def read(self, block: Block, x: Tensor) -> Tensor:
        before = self.estimate(block)
        values = before.mul(self.decay).add_(x * self.weight)
        if block.good is not None:
            values = values.where(block.good, before)  # which is encoded to the same codes
        self.store(block, values)
        return values

    def store(self, block: Block, values: Tensor) -> None:
        """Encode the block's new values, ``[k, *row_shape]``."""
        raise NotImplementedError

    def noise(self, block: Block) -> Tensor:
        """``[k, row_numel]``, as `rounding_noise`."""
        return rounding_noise(self.spec, self.seed, block, self.codes.device)

    def quantize(self, values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, a byte each, and largest magnitudes of values side by side.

        Args:
            values: float32 ``[k, n]``, in blocks from the first of each row.
            noise: int32 of that shape, 16 random bits each.

        Returns:
            uint8 ``[k, n]``; float32 ``[k, ceil(n / block)]``.
        """
        count = values.shape[1]
        blocks = self.in_blocks(values)  # [k, blocks, block]
        ratio = blocks.abs()
        absmax = ratio.amax(dim=2)
        usable = (absmax < torch.inf) & (absmax >= TINY)
        # 0 of what is tiny, NaN of infinity: one that is not finite would leave nothing of the others in its block.
        absmax = absmax.where(usable, absmax * 0.0)
        ratio.mul_(absmax.reciprocal().unsqueeze(2)).mul_(float(self.largest**2))
        ratio.masked_fill_(usable.logical_not().unsqueeze(2), 0.0)
        if not self.spec.signed:
            ratio.clamp_min_(1.0)
        lower = ratio.sqrt().floor_()
        # The codes' values are c**2 and (c + 1)**2: up with probability (ratio - c**2) / (2 c + 1).
        chance = (self.in_blocks(noise) >> 16 - NOISE_BITS).to(torch.float32).add_(0.5).mul_(0.5**NOISE_BITS)
        up = chance.mul_(lower.mul(2.0).add_(1.0)) < ratio.sub_(lower.square())
        codes = (lower if self.spec.signed else lower.sub_(1.0)).to(torch.uint8).add_(up)
        if self.spec.signed:
            negative = blocks.signbit().logical_and_(codes != 0)
            codes.bitwise_or_(negative.to(torch.uint8) << self.codec.bits - 1)
        return codes.flatten(1)[:, :count], absmax

    def dequantize(self, codes: Tensor, absmax: Tensor) -> Tensor:
        """What codes mean, in float32.

        Args:
            codes: a byte each.
            absmax: of their blocks, broadcastable to them.
        """
        if not self.spec.signed:
            values = codes.to(torch.float32).add_(1.0)
            return values.mul_(values).mul_(1 / self.largest**2).mul_(absmax)  # vmap has no square_
        sign = 1 << self.codec.bits - 1
        codes = codes.to(torch.uint8)  # a checkpoint may have been cast
        values = codes.bitwise_and(sign - 1).to(torch.float32)
        values.mul_(values).mul_(1 / self.largest**2).mul_(absmax)
        return torch.where(codes >= sign, -values, values)

    def in_blocks(self, x: Tensor) -> Tensor:
        """``[k, n]`` as ``[k, blocks, block]``; what a last block lacks is 0, and a block alone is as long as it is."""
        count = x.shape[1]
        if count <= self.codec.block:
            return x[:, None]
        if beyond := -count % self.codec.block:
            x = pad(x, (0, beyond))
        return x.view(x.shape[0], -1, self.codec.block)

    def pack(self, codes: Tensor) -> Tensor:
        """A byte each, ``[k, n]``, as they are stored: of 4 bits the first of two is the lower half."""
        if self.codec.bits == 8:
            return codes
        if codes.shape[1] % 2:
            codes = pad(codes, (0, 1))
        return codes[:, ::2] | codes[:, 1::2] << 4

    def unpack(self, stored: Tensor, count: int) -> Tensor:
        """The first `count` codes of each row of ``[k, bytes]``, a byte each."""
        if self.codec.bits == 4:
            stored = stored.to(torch.uint8)
            stored = torch.stack((stored & 15, stored >> 4), dim=2).flatten(1)
        return stored[:, :count]


class _Rows(_Quantized):
    def fusable(self) -> bool:
        shard, codec = self.spec.shard, self.codec
        columns = shard.row_numel
        blocks = -(-columns // codec.block)
        return (
            codec.block <= MOST_BLOCK
            and shard.table_columns == columns  # else there is a gap after each row
            and self.plain(self.codes, shard.local_rows * codec.bytes_of(columns), torch.uint8)
            and self.plain(self.absmax, shard.local_rows * blocks)
        )

    def to_kernel(self) -> KernelState:
        codec = self.codec
        # by position: half as long
        return KernelState(
            Kind.QUANTIZED,
            self.codes,
            self.absmax,
            self.decay,
            self.weight,
            0.0,
            1.0,
            self.spec.signed,
            codec.bits,
            codec.block,
            self.seed,
        )

    def store(self, block: Block, values: Tensor) -> None:
        codes, absmax = self.quantize(values.reshape(block.size, -1).float(), self.noise(block))
        stored = self.pack(codes)
        self.codes[block.index, : stored.shape[1]] = stored
        self.absmax[block.index, : absmax.shape[1]] = absmax

    def estimate(self, block: Block) -> Tensor:
        shard = self.spec.shard
        codes = self.in_blocks(self.unpack(self.codes[block.index], shard.row_numel))
        absmax = self.absmax[block.index][:, : codes.shape[1]].unsqueeze(2)
        values = self.dequantize(codes, absmax).flatten(1)[:, : shard.row_numel]
        return values.to(self.spec.dtype).reshape(block.size, *shard.row_shape)


class _Vector(_Quantized):
    """A parameter of one dimension, or none: blocks run along it."""

    def store(self, block: Block, values: Tensor) -> None:
        start = self._first_block(block.index)
        if start is None:
            # Other elements of the same blocks are encoded anew with them; all others stay as they are.
            start, everything = 0, slice(0, self.spec.shard.local_rows)
            whole = Block(self.spec.shard, everything, everything)
            merged = self.estimate(whole)
            merged[block.index] = values
            block, values = whole, merged
        codes, absmax = self.quantize(values.reshape(1, -1).float(), self.noise(block).view(1, -1))
        stored = self.pack(codes)[0]
        self.codes[self.codec.bytes_of(start * self.codec.block) :][: len(stored)] = stored
        self.absmax[start:][: absmax.shape[1]] = absmax[0]

    def _first_block(self, index: slice | Tensor) -> int | None:
        """The first of the blocks that some elements fill; ``None`` if they do not fill blocks."""
        if isinstance(index, Tensor) or index.start % self.codec.block:
            return None
        ends = index.stop % self.codec.block == 0 or index.stop == self.spec.shard.local_rows
        return index.start // self.codec.block if ends else None

    def estimate(self, block: Block) -> Tensor:
        ids = block.local_ids(self.codes.device)
        codes = self.unpack(self.codes[None], self.spec.shard.local_rows)[0]
        values = self.dequantize(codes[ids], self.absmax[ids // self.codec.block])
        return values.to(self.spec.dtype).reshape(block.size, *self.spec.shard.row_shape)


def _is_vector(shard: Shard) -> bool:
    return len(shard.global_shape) < 2
