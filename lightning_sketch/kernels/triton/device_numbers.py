"""Tables whose numbers the device writes: of steps that can be captured into a graph.

What does not change from step to step lies on the device for good (`Resident`): the words of the layers without their
numbers, and a recipe for each layer, which says where its numbers come from. One kernel makes of both the table of a
step. So a step copies nothing from the host, and a graph that replays it finds the numbers of that replay.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sketch.kernels.capture import capturing
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.kernels.triton.jit import OPTIONS
from lightning_sketch.kernels.triton.recipes import Values, is_scaled, recipe, states_of
from lightning_sketch.kernels.triton.write_words import ADDRESSES, put_addresses, write_words

#: Programs of a layer: together they multiply a state whose scale gets small, which is seldom.
_SHARES, _TILE = 32, 1024


@dataclass
class Resident:
    """What lies on the device from step to step. Nothing there is ever written again: a graph may read it.

    Args:
        host: what was copied there, the gradients' addresses left out.
        addresses: of the gradients.
        static: words of the layers, int64 ``[layers * COUNT]``.
        recipes: int64 ``[layers * RECIPE]``.
        gradients: the addresses, int64.
    """

    host: bytes
    addresses: tuple[int, ...]
    static: Tensor
    recipes: Tensor
    gradients: Tensor


#: What graphs read, which may outlive the optimizers whose steps they replay.
_captured: list[tuple[Tensor, ...]] = []


def device_words(steps: Sequence[FusedStep], words: Sequence[bytes], scratch: Tensor, zeros: Tensor) -> Tensor:
    """The table of a step, int64 ``[layers * COUNT]``; scales are modified in place, and states whose scale gets small.

    Args:
        steps: of the layers, in the order of the table, which is not empty.
        words: of the layers, without numbers and the gradients' addresses, and with distances in place of addresses
            in `scratch` and `zeros`.
        zeros: the last ``len(steps)`` are for this alone.

    Raises:
        RuntimeError: a graph is being captured, and these layers were not stepped outside of one before.
    """
    values = Values()
    recipes = b"".join(recipe(step, values) for step in steps)
    held = _resident(steps, b"".join(words), recipes, zeros.device)
    amp = next((step.on_device for step in steps if is_scaled(step)), None)
    made = torch.empty_like(held.static)
    scaled = any(stored is not None and stored.scale_at is not None for step in steps for stored in states_of(step))
    write_words[(len(steps), _SHARES if scaled else 1)](
        made,
        held.static,
        held.recipes,
        held.gradients,
        torch.stack(values.tensors),
        None if amp is None else amp.found_inf,
        None if amp is None else amp.grad_scale,
        scratch=scratch.data_ptr(),
        zeros=zeros.data_ptr(),
        tickets=zeros.data_ptr() + 8 * (len(zeros) - len(steps)),
        TILE=_TILE,
        **(OPTIONS | {"num_warps": 1}),
    )
    return made


def hold(*tensors: Tensor) -> None:
    """Keep tensors, which a graph that is being captured will read, for as long as the process runs."""
    _captured.append(tensors)


def _resident(steps: Sequence[FusedStep], words: bytes, recipes: bytes, device: torch.device) -> Resident:
    """What lies on the device; copied there if it is not what lies there."""
    addresses = tuple(step.grad.data_ptr() for step in steps)
    cache, host = steps[0].cache, words + recipes
    held: Resident | None = None if cache is None else cache.resident
    if held is None or held.host != host:
        if capturing():
            raise RuntimeError(
                "a graph is captured of a step that was not made before: of other layers, or gradients laid out "
                "otherwise; make a few steps with the same gradients on a side stream first, as torch's documentation "
                "of CUDA graphs says"
            )
        both = _there(host, device)
        split = len(words) // 8
        # By a kernel, which is compiled and loaded then: neither can be done while a graph is captured.
        held = Resident(host, addresses, both[:split], both[split:], _put(addresses, device))
    elif held.addresses != addresses:
        # What the host holds may be gone when a graph is replayed; arguments of launches stay.
        packed = struct.pack(f"<{len(addresses)}q", *addresses)
        gradients = _put(addresses, device) if capturing() else _there(packed, device)
        held = Resident(host, addresses, held.static, held.recipes, gradients)
    if capturing():
        _captured.append((held.static, held.recipes, held.gradients))
    elif cache is not None:
        cache.resident = held
    return held


def _put(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses, and some zeros, in a tensor that launches write."""
    padded = addresses + (0,) * (-len(addresses) % ADDRESSES)
    held = torch.empty(len(padded), dtype=torch.int64, device=device)
    for start in range(0, len(padded), ADDRESSES):
        put_addresses[(1,)](held[start:], *padded[start : start + ADDRESSES], **OPTIONS)
    return held


def _there(host: bytes, device: torch.device) -> Tensor:
    words = torch.frombuffer(bytearray(host), dtype=torch.int64)
    # Pinned, so that the copy waits for nothing; torch keeps that memory until the copy is made.
    return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words
