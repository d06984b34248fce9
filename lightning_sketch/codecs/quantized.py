"""States in 8 or 4 bits, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sketch.codecs.base import Codec
from lightning_sketch.codecs.rounding import noise_seed, rounding_noise
from lightning_sketch.codecs.state import CodecState, Count, Entry, Number, StateSpec, Tensors
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import MOST_BLOCK, KernelState
from lightning_sketch.sharding import Block, Shard
from lightning_sketch.sharding.base import BLOCK_NUMEL

#: Blocks whose largest magnitude is below this (8e-31) are stored as zeros: what divides by it must not overflow.
TINY = 2.0**-100
#: The number before it.
BELOW_TINY = TINY * (1 - 2.0**-24)
#: Random bits of a rounding. With more, a number that lies on a code but for an error of arithmetic could leave it.
NOISE_BITS = 13


@dataclass(frozen=True)
class Quantized(Codec):
    r"""Store the state in 8 or 4 bits an element, and one float32 for every block: its largest magnitude `a`.

    Codes are spaced by the square root. Signed states (first moments) have a sign and a magnitude c, and mean
    :math:`\pm a (c / C)^2` with C = 127 (7): the many elements that are small beside the block's largest keep some
    digits. Non-negative states (second moments) mean :math:`a ((c + 1) / C)^2` with C = 256 (16), so that their root,
    which updates are divided by, is spaced evenly, and none becomes 0 while another of its block is not: an update that
    divides by a lost second moment would explode. A block of zeros means exactly 0, and one whose largest magnitude is
    below 2**-100 (8e-31) becomes one.

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
    accelerator_blocks: ClassVar[int] = 4
    live_blocks: ClassVar[int] = 8

    bits: int = 8
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
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
        values = self.decayed(block, self.decay).add_(x * self.weight)
        del x  # squares, which nobody else holds
        self.store(block, values)
        return values

    def estimate(self, block: Block) -> Tensor:
        return self.decayed(block, None)

    def decayed(self, block: Block, decay: Number | None) -> Tensor:
        """What is held times `decay`, but for rows that are left out: they are encoded to the same codes."""
        raise NotImplementedError

    @staticmethod
    def scale(block: Block, absmax: Tensor, decay: Number | None) -> Tensor:
        """Largest magnitudes ``[k, ...]`` times `decay`; decoded with these, no element is multiplied by it."""
        if decay is None:
            return absmax
        scaled = absmax * decay
        if (good := block.good) is None:
            return scaled
        return scaled.where(good.reshape(len(absmax), *(1,) * (absmax.ndim - 1)), absmax)

    def store(self, block: Block, values: Tensor) -> None:
        """Encode the block's new values, ``[k, *row_shape]``."""
        raise NotImplementedError

    def chances(self, block: Block) -> Tensor:
        """``2 (n + 0.5) / 2**13`` of the random bits n of every element, float32 ``[k, row_numel]``."""
        device, unit = self.codes.device, 2.0**-NOISE_BITS
        # A tensor, whose dtype, and not torch's default one, is the sum's.
        half = self._memo(block, "half", lambda: torch.full((), unit, dtype=torch.float32, device=device))
        return torch.add(half, rounding_noise(self.spec, self.seed, block, device, NOISE_BITS), alpha=2 * unit)

    def quantize(self, values: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, a number each, and largest magnitudes of values side by side.

        On accelerators every operation is a launch over all elements, and every tensor of their size counts: hence few
        of both.

        Args:
            values: float32 ``[k, n]``, in blocks from the first of each row.
            chances: of that shape, as `chances` (modified in place).

        Returns:
            float32 ``[k, n]``; float32 ``[k, ceil(n / block)]``.
        """
        count = values.shape[1]
        ratio = self.in_blocks(values).abs()  # [k, blocks, block]
        # 0 of what is tiny, NaN of infinity: one that is not finite would leave nothing of the others in its block.
        absmax = torch.threshold(ratio.amax(dim=2), BELOW_TINY, 0.0).fmod(torch.inf)
        ratio.mul_(absmax.reciprocal().mul_(float(self.largest**2)).unsqueeze(2))
        ratio = ratio.flatten(1)[:, :count]
        ratio.nan_to_num_(0.0, 0.0)  # of 0 and NaN the reciprocal is not finite
        if not self.spec.signed:
            ratio.clamp_min_(1.0)
        codes = ratio.sqrt().floor_()
        # The codes' values are c**2 and (c + 1)**2: up with probability (ratio - c**2) / (2 c + 1). Products and sums
        # are exact, fused or not.
        ratio = ratio.addcmul(codes, codes, value=-1.0)  # vmap has no addcmul_
        threshold = chances.mul_(codes.add(0.5))
        if not self.spec.signed:
            codes.add_(threshold >= ratio, alpha=-1)
        else:
            codes.add_(threshold < ratio)
            del ratio, threshold
            codes.add_(values.signbit().logical_and_(codes), alpha=1 << self.codec.bits - 1)  # 0 has no sign
        return codes, absmax

    def decoded(self, block: Block, stored: Tensor) -> Tensor:
        """What codes mean beside a largest magnitude of 1, float32 ``[..., bytes * codes of a byte]``.

        Args:
            stored: of the block, ``[..., bytes]``.
        """
        book = self._memo(block, ("book", self.codec.bits, self.spec.signed), self._code_book)
        stored = stored.to(torch.uint8).to(torch.int32)  # a checkpoint may have been cast
        return torch.nn.functional.embedding(stored, book).flatten(-2)

    def _code_book(self) -> Tensor:
        """What the codes of each byte mean, float32 ``[256, codes of a byte]``."""
        bits, device = self.codec.bits, self.codes.device
        if self.spec.signed:
            c = torch.arange(self.largest + 1, dtype=torch.float32, device=device)
        else:
            c = torch.arange(1, self.largest + 1, dtype=torch.float32, device=device)
        values = c.square().mul_(1 / self.largest**2)
        if self.spec.signed:
            values = torch.cat((values, -values))
        if bits == 8:
            return values.unsqueeze(1)
        return torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)  # the lower half first

    @staticmethod
    def _memo(block: Block, key: object, make: Callable[[], Tensor]) -> Tensor:
        return make() if block.whole is None else block.whole.memo(key, make)

    def in_blocks(self, x: Tensor) -> Tensor:
        """``[k, n]`` as ``[k, blocks, block]``; what a last block lacks is 0, and a block alone is as long as it is."""
        count = x.shape[1]
        if count <= self.codec.block:
            return x[:, None]
        if beyond := -count % self.codec.block:
            x = pad(x, (0, beyond))
        return x.view(x.shape[0], -1, self.codec.block)

    def pack(self, codes: Tensor) -> Tensor:
        """A number each, ``[k, n]``, as bytes: of 4 bits the first of two is the lower half."""
        if self.codec.bits == 8:
            return codes
        if codes.shape[1] % 2:
            codes = pad(codes, (0, 1))
        return torch.add(codes[:, ::2], codes[:, 1::2], alpha=16)


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
        codes, absmax = self.quantize(values.reshape(block.size, -1).float(), self.chances(block))
        stored = self.pack(codes)
        if isinstance(block.index, Tensor):
            stored = stored.to(self.codes.dtype)  # contiguous rows are converted while they are copied
        self.codes[block.index, : stored.shape[1]] = stored
        self.absmax[block.index, : absmax.shape[1]] = absmax

    def decayed(self, block: Block, decay: Number | None) -> Tensor:
        shard = self.spec.shard
        scale = self.scale(block, self.absmax[block.index], decay)
        values = self.in_blocks(self.decoded(block, self.codes[block.index])[:, : shard.row_numel])
        values = values.mul_(scale[:, : values.shape[1]].unsqueeze(2))
        values = values.flatten(1)[:, : shard.row_numel]
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
        codes, absmax = self.quantize(values.reshape(1, -1).float(), self.chances(block).view(1, -1))
        stored = self.pack(codes)[0]
        self.codes[self.codec.bytes_of(start * self.codec.block) :][: len(stored)] = stored
        self.absmax[start:][: absmax.shape[1]] = absmax[0]

    def _first_block(self, index: slice | Tensor) -> int | None:
        """The first of the blocks that some elements fill; ``None`` if they do not fill blocks."""
        if isinstance(index, Tensor) or index.start % self.codec.block:
            return None
        ends = index.stop % self.codec.block == 0 or index.stop == self.spec.shard.local_rows
        return index.start // self.codec.block if ends else None

    def decayed(self, block: Block, decay: Number | None) -> Tensor:
        ids = block.local_ids(self.codes.device)
        scale = self.scale(block, self.absmax[ids // self.codec.block], decay)
        values = self.decoded(block, self.codes)[ids].mul_(scale)
        return values.to(self.spec.dtype).reshape(block.size, *self.spec.shard.row_shape)


def _is_vector(shard: Shard) -> bool:
    return len(shard.global_shape) < 2
