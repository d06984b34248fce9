"""Codecs: how one optimizer state of one layer is stored. One file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_sketch.codecs.base import Codec, allocate
from lightning_sketch.codecs.bfloat16 import BFloat16
from lightning_sketch.codecs.count_sketch import CountSketch
from lightning_sketch.codecs.decay import scale_tensor
from lightning_sketch.codecs.drop import Drop
from lightning_sketch.codecs.elementwise import ElementwiseCodec
from lightning_sketch.codecs.encoding import (
    Encoding,
    Rows,
    check_finite,
    decode,
    encode,
    relative_error,
    relative_norm,
    rows_of,
    transcode,
    widened,
)
from lightning_sketch.codecs.factored import Factored
from lightning_sketch.codecs.keep import Keep
from lightning_sketch.codecs.quantized import Quantized
from lightning_sketch.codecs.row_wise import RowWise
from lightning_sketch.codecs.sm3 import SM3
from lightning_sketch.codecs.state import CodecState, StateSpec, Tensors, key_of

__all__ = [
    "SM3",
    "BFloat16",
    "Codec",
    "CodecState",
    "CountSketch",
    "Drop",
    "ElementwiseCodec",
    "Encoding",
    "Factored",
    "Keep",
    "Quantized",
    "RowWise",
    "Rows",
    "StateSpec",
    "Tensors",
    "allocate",
    "check_finite",
    "codec_from",
    "decode",
    "encode",
    "key_of",
    "relative_error",
    "relative_norm",
    "rows_of",
    "scale_tensor",
    "transcode",
    "widened",
]


def codec_from(value: Codec | str | Mapping[str, Any]) -> Codec:
    """A codec from its name or its dictionary, as YAML and checkpoints hold it.

    >>> codec_from("RowWise"), codec_from({"codec": "CountSketch", "compression": 5}).compression
    (RowWise(compression=1.0, depth=3, lazy=False), 5)

    Raises:
        ValueError: no such codec, or no such option.
    """
    if isinstance(value, Codec):
        return value
    if isinstance(value, type) and issubclass(value, Codec):
        raise ValueError(f"codec {value.__name__}: give an object, {value.__name__}(), or the name {value.__name__!r}")
    if not isinstance(value, str) and not (isinstance(value, Mapping) and "codec" in value):
        raise ValueError(
            f"{value!r} is no codec: give an object as RowWise(compression=10), a name, or a dictionary with the key "
            "'codec' and the codec's options, as {'codec': 'RowWise', 'compression': 10}"
        )
    options = {"codec": value} if isinstance(value, str) else dict(value)
    name = options.pop("codec")
    if name not in Codec.registry:
        raise ValueError(f"unknown codec {name!r}; known are {', '.join(sorted(Codec.registry))}")
    try:
        return Codec.registry[name](**options)
    except TypeError as error:
        raise ValueError(f"codec {name}: {error}") from None
