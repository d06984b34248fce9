"""The Triton kernels compiled ahead of time for GPUs that are not here: registers, spills, and no recompilation.

Run by test_triton.py in a process of its own, whose Triton believes in a device. Steps are launched as they are on a
device, through Triton's own handling of arguments; nothing is executed.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lightning_sketch import (
    SM3,
    BFloat16,
    Codec,
    CountSketch,
    Drop,
    Factored,
    Keep,
    Quantized,
    RowWise,
    kernels,
)
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.schema import FusedStep
from lightning_sketch.kernels.triton import columns as of_columns
from lightning_sketch.kernels.triton import (
    device_numbers,
    insert,
    launch,
    launches,
    observe,
    quantized,
    row_sketch,
    write_words,
)
from lightning_sketch.kernels.triton.jit import OPTIONS
from lightning_sketch.optimizer import on_device
from lightning_sketch.optimizer.step import pending_updates, step_compressed
from tests.kernels import observed
from tests.kernels.fused_cases import Case, start, train

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Of a thread. A multiprocessor of NVIDIA's has 65,536, so 128 let 16 of its 64 warps run at a time; one of gfx942
#: has 512 for each lane, so 80 let 6 of its 8 wavefronts run at a time.
MOST_REGISTERS = {"cuda": 128, "hip": 80}
#: On gfx942: of `apply` with SM3, which is one or two wavefronts that find maxima without waiting for others; and of
#: `settle`, which takes them where a row is not finite, to make sums of columns once more.
MOST_OF_SM3, MOST_OF_SETTLE = 96, 160

#: Bytes of a stack frame that holds no registers, but predicates of masks.
MASKS = 8

#: Bytes of scratch memory, and registers spilled there or (scalar ones) into lanes of vector registers.
AMD_SPILLS = ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")

CODECS: list[tuple[Codec, Codec]] = [
    (RowWise(), Drop()),
    (RowWise(), BFloat16()),
    (RowWise(compression=4), Drop()),
    (SM3(), Drop()),
    (SM3(), BFloat16()),
    (Factored(), Drop()),
    (Factored(), BFloat16()),
    (CountSketch(compression=4), Drop()),
    (CountSketch(compression=4), CountSketch(compression=4)),
    (BFloat16(), BFloat16()),
    (Quantized(), Quantized()),
    (Quantized(bits=4), Quantized(bits=4)),
    (Factored(), Quantized()),
    (RowWise(), Keep()),
]


#: Gradients, sparse or not, and their dtype: of two that are two apart, both differ.
KINDS = [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)]

KERNELS = (
    launches.apply,
    of_columns.finish_factored,
    of_columns.finish_sm3,
    of_columns.reduce_columns,
    insert.hash_rows,
    insert.insert,
    observe.observe,
    observe.settle,
    quantized.hash_columns,
    row_sketch.add_rows,
    row_sketch.fold_rows,
)
#: What steps launch beside those where their numbers stay on the device.
OF_NUMBERS = (write_words.write_words, write_words.put_addresses)


class Pretended:
    """A driver of a device that can be compiled for, and not run on."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


Launched = list[tuple[str, dict[str, Any], Any]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launched]:
    """Compile for a target what is launched: name, arguments and compiled kernel of each launch.

    Of kernels that are not asked for only what they would be compiled for is told apart.
    """
    found: Launched = []
    wanted: list[Any] = []
    run, do_compile = JITFunction.run, JITFunction._do_compile

    def compile_wanted(self: Any, key: Any, signature: Any, device: Any, *rest: Any, **options: Any) -> Any:
        if self in wanted:
            return do_compile(self, key, signature, device, *rest, **options)
        told = SimpleNamespace(hash=(self.fn.__name__, key), asm=None)
        self.device_caches[device][0][key] = told
        return told

    monkeypatch.setattr(JITFunction, "_do_compile", compile_wanted)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, kwargs, compiled))
        return compiled

    monkeypatch.setattr(JITFunction, "run", compile_only)

    def step(steps: Sequence[FusedStep]) -> Tensor:
        for each in steps:
            each.leave_out = True
        return launch.step(steps)

    monkeypatch.setattr(kernels, "fused_kernel", lambda device: step)

    def on(target: GPUTarget, compiled: Sequence[Any] = ()) -> Launched:
        wanted[:] = compiled
        monkeypatch.setattr(driver, "_active", Pretended(target))
        for function in (*KERNELS, *OF_NUMBERS):
            function.device_caches.clear()
        return found

    return on


@pytest.mark.parametrize("arch", TARGETS)
def test_no_kernel_spills_nor_stores_what_another_warp_has_yet_to_read(
    arch: str, launched: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = TARGETS[arch]
    found = launched(target, KERNELS)
    for number, (second, first) in enumerate(CODECS):
        if arch == "sm_80" and number % 2 and second != CountSketch(compression=4):
            continue  # it has the compiler of sm_90: half of the pairs show what is otherwise there
        # By turns: of every pair dense and sparse gradients, float32 and bfloat16; elsewhere, where it takes no other
        # code, one of these four.
        kinds = KINDS[number % 4], KINDS[(number + 2) % 4]
        for sparse, dtype in kinds if arch == "sm_90" else kinds[:1]:
            train(Case("adamw", second, first, rows=256, columns=512, sparse=sparse, dtype=dtype, steps=1))
    if arch != "sm_80":  # which has the compiler of sm_90
        for columns in (1, 50, 64, 8192):
            train(Case("adamw", RowWise(), BFloat16(), rows=256, columns=columns, steps=1))
        for second in (SM3(), Factored()):
            train(Case("adamw", second, Drop(), rows=256, columns=50, steps=1))
        train(Case("nesterov", Drop(), BFloat16(), 256, 512, steps=1))
    train(Case("adam", CountSketch(compression=4, depth=8), CountSketch(compression=4, depth=8), 256, 512, steps=1))
    for second in (RowWise(), SM3(), Quantized(bits=4, block=1024)):  # with the most registers
        train(Case("adamw", second, Quantized(bits=4, block=16), 256, 4096, steps=1))
    train(Case("adagrad", SM3(momentum=0.9), Drop(), 256, 512, steps=1))
    for kind in (Kind.ROW, Kind.ROW_SKETCH, Kind.FACTORED) if arch != "sm_80" else ():
        launch.step([observed.held_step(kind, first=kind != Kind.ROW, sparse=False)[0]])
    if arch != "sm_80":
        launch.observe_gradients(observed.steps(torch.float32, sparse=False, leave_out=True))

    used = {compiled.hash: (name, arguments, compiled) for name, arguments, compiled in found}
    assert len(used) > 30
    print(f"\n{arch}: registers and bytes of local memory of {len(used)} kernels")
    spilling, large = [], []
    stores, racing = 0, []
    for name, arguments, compiled in used.values():
        registers, local = _resources(compiled.asm, tmp_path / "cubin")
        line = f"{registers:3} {local:2} {name:12} {_constants(arguments)}"
        print(f"  {line}")
        if local > MASKS:
            spilling.append(line)
        if registers > _most_registers(target, name, arguments):
            large.append(line)
        threads = target.warp_size * arguments.get("num_warps", OPTIONS["num_warps"])
        stored, unread = _stored_unread(compiled.asm["ttgir"], threads)
        stores += stored
        racing += [f"{line}: {each}" for each in unread]
    assert not spilling
    assert not large
    assert {name for name, _, _ in used.values()} == {function.fn.__name__ for function in KERNELS}
    assert stores
    assert not racing


@pytest.mark.parametrize(("second", "first"), CODECS[:-1], ids=repr)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_nothing_is_compiled_again_from_step_to_step(
    second: Codec, first: Codec, sparse: bool, launched: Callable[..., Launched]
) -> None:
    found = launched(TARGETS["sm_90"])
    train(Case("adamw", second, first, rows=256, columns=512, sparse=sparse, steps=1))
    before = {compiled.hash for _, _, compiled in found}
    assert before
    train(Case("adamw", second, first, rows=256, columns=512, sparse=sparse, steps=5))
    assert {compiled.hash for _, _, compiled in found} == before


def _most_registers(target: GPUTarget, name: str, arguments: dict[str, Any]) -> int:
    if target.backend == "hip" and name == "settle":
        return MOST_OF_SETTLE
    if target.backend == "hip" and name == "apply" and arguments["SECOND_KIND"] == Kind.SM3:
        return MOST_OF_SM3
    return MOST_REGISTERS[target.backend]


def _stored_unread(ttgir: str, threads: int) -> tuple[int, list[str]]:
    """Stores of tiles that were loaded before, held by several threads; and those with no barrier since the load.

    Of a tile with fewer elements than threads, several threads hold each: one stores what others are to have read. The
    interpreter cannot show it, having no threads.
    """
    loaded: dict[str, int] = {}
    barriers = [number for number, line in enumerate(ttgir.splitlines()) if "barrier" in line]
    stores, racing = 0, []
    for number, line in enumerate(ttgir.splitlines()):
        if found := re.search(r"= tt\.load (%[\w#]+)", line):
            loaded[found[1]] = number
        elif found := re.search(r"tt\.store (%[\w#]+),.*tensor<([\dx]+)x!tt\.ptr", line):
            elements = math.prod(int(size) for size in found[2].split("x"))
            if found[1] in loaded and elements < threads:
                stores += 1
                if not any(loaded[found[1]] < barrier < number for barrier in barriers):
                    racing.append(line.strip())
    return stores, racing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_observing_streams_without_barriers(
    dtype: torch.dtype, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    found = launched(TARGETS["sm_90"], [observe.observe])
    for second in (Factored(), RowWise(compression=4)):
        train(Case("adamw", second, Drop(), rows=256, columns=4096, dtype=dtype, steps=1))
    kernels_found = [compiled for name, _, compiled in found if name == "observe"]
    assert len(kernels_found) == 2
    for compiled in kernels_found:
        loops = _loops(compiled.asm["ptx"])
        assert any("ld.global" in loop for loop in loops)
        assert not any("bar.sync" in loop or "st.shared" in loop for loop in loops)
        assert _resources(compiled.asm, tmp_path / "cubin")[0] <= 80


def _loops(ptx: str) -> list[str]:
    """What lies between labels and branches back to them."""
    lines = ptx.splitlines()
    labels = {found[1]: number for number, line in enumerate(lines) if (found := re.match(r"(\$\w+):", line))}
    ends = ((number, re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)) for number, line in enumerate(lines))
    return ["\n".join(lines[labels[to[1]] : end]) for end, to in ends if to and labels[to[1]] < end]


def test_other_sizes_share_kernels(launched: Callable[..., Launched]) -> None:
    found = launched(TARGETS["sm_90"])
    for rows, columns in ((1000, 768), (1001, 1024), (4000, 640), (16, 600)):
        train(Case("adamw", CountSketch(compression=4), Drop(), rows, columns, steps=1))
    assert {name for name, _, _ in found} == {"observe", "settle", "hash_rows", "insert", "apply"}
    assert len({compiled.hash for _, _, compiled in found}) == 5


@pytest.mark.parametrize("arch", TARGETS)
def test_numbers_that_stay_on_the_device_are_written_without_spills_and_compiled_once(
    arch: str, launched: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = launched(TARGETS[arch], OF_NUMBERS)
    monkeypatch.setattr(on_device, "DEVICES", ("cpu",))
    for second, first in ((Factored(), BFloat16()), (SM3(), Drop()), (CountSketch(compression=4), Drop())):
        layer, optimizer, _ = start(Case("adamw", second, first, rows=256, columns=512))
        optimizer.param_groups[0].update(capturable=True, fused=True, lr=torch.tensor(0.1))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(512.0), torch.tensor(0.0)
        for captured in (False, False, True):
            monkeypatch.setattr(device_numbers, "capturing", lambda now=captured: now)
            layer.weight.grad = torch.randn(256, 512)
            with torch.no_grad():
                step_compressed(optimizer, pending_updates(optimizer))
    used = {compiled.hash: (name, compiled) for name, _, compiled in found}
    names = [name for name, _ in used.values()]
    for function in OF_NUMBERS:
        assert names.count(function.fn.__name__) == 1
    written = [(name, compiled) for name, compiled in used.values() if compiled.asm is not None]
    assert len(written) == len(OF_NUMBERS)
    assert {name: _resources(compiled.asm, tmp_path / "cubin")[1] for name, compiled in written} == dict.fromkeys(
        (function.fn.__name__ for function in OF_NUMBERS), 0
    )


def _resources(asm: dict[str, Any], path: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory, where spilled registers lie."""
    if "amdgcn" in asm:
        return _of_amdgcn(asm["amdgcn"], "vgpr_count"), sum(_of_amdgcn(asm["amdgcn"], name) for name in AMD_SPILLS)
    path.write_bytes(asm["cubin"])
    output = subprocess.run(
        [os.fspath(CUOBJDUMP), "--dump-resource-usage", os.fspath(path)], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", output)
    assert found, output
    return int(found[1]), int(found[2]) + int(found[3])


def _of_amdgcn(text: str, name: str) -> int:
    """A number from the metadata of a kernel, at the end of its assembly."""
    (found,) = re.findall(rf"^ +\.{name}: +(\d+)$", text, re.MULTILINE)
    return int(found)


def _constants(arguments: dict[str, Any]) -> str:
    """Compile-time arguments, in words."""
    return " ".join(f"{key}={value}" for key, value in arguments.items() if key.isupper() or key == "num_warps")
