"""How far every codec under every engine is from one process: measured, and written into docs/sharding.md.

    python -m tests.exactness          # measure with 1 to 4 ranks and rewrite the tables of docs/sharding.md

Two hundred AdamW steps with prescribed gradients, so that what happens to one layer cannot reach another through the
loss; parameters are compared with those of one process. `demo_exactness.py` does the same with the demo's model, whose
gradients react. `tests/test_exactness.py` measures some of both again and holds the tables to it.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_sketch import Policy, Rule, compress
from lightning_sketch.sharding import local
from tests.checkpoints.engines import POLICY, TABLES, make
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks

STEPS = 200
#: After which ZeRO-2 is known to be ZeRO-1, or not.
EARLY = 20
ENGINES = {"rows": "FSDP2, Shard(0)", "columns": "FSDP2, Shard(1)", "zero1": "ZeRO-1, -2", "zero3": "ZeRO-3"}
LABELS = {
    "rows": "Drop + RowWise",
    "rounded": "BFloat16 of both",
    "sm3": "Keep + SM3",
    "factored": "BFloat16 + Factored",
    "quantized": "Quantized of both, 4 and 8 bits",
    "sketch": "CountSketch of both",
    "exact": "CountSketch as wide as the table",
    "sketched_rows": "Keep + RowWise(compression)",
    "head": "kept layers",
}
DOCUMENT = Path(__file__).parent.parent / "docs" / "sharding.md"

#: For memory: a table large enough that borders and counters do not matter.
LARGE = (4096, 24)


def measure(rank: int, world_size: int) -> dict[str, Any]:
    """Parameters after training under every engine, and bytes of states on this rank."""
    init_deepspeed(rank, world_size)
    found: dict[str, Any] = {}
    for kind in (*ENGINES, "zero2"):
        run = make(kind, separate=True)  # a group for each layer: ZeRO-1 and -2 cut every group
        run.train(range(EARLY))
        found[f"{kind} early"] = parameters(run.model)
        if kind in ENGINES:
            run.train(range(EARLY, STEPS))
            found[kind] = parameters(run.model)
            found[f"{kind} bytes"] = {name: large_bytes(kind, name) for name in TABLES}
    return found


def one_process() -> tuple[dict[str, Tensor], dict[str, int]]:
    """The same on one process."""
    return trained_alone(seed=0), {name: large_bytes("single", name) for name in TABLES}


def trained_alone(seed: int) -> dict[str, Tensor]:
    """Parameters after training in one process under a hash seed."""
    run = make("single", Policy(POLICY.rules, seed=seed))
    run.train(range(STEPS))
    return parameters(run.model)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, whole."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    gathered: Any = contextlib.nullcontext()
    if sharded:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(sharded)
    with gathered:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }


class OneTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(*LARGE)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).sum()


def large_bytes(kind: str, codecs: str) -> int:
    """Bytes of the states of one large table on this rank."""
    model: nn.Module = OneTable()
    if kind in ("rows", "columns"):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        dim = 0 if kind == "rows" else 1
        fully_shard(
            model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), shard_placement_fn=lambda p: Shard(dim)
        )
    policy = Policy([Rule(role="embedding", **TABLES[codecs])])
    optimizer = compress(torch.optim.AdamW(model.parameters()), model, policy)
    if kind.startswith("zero"):
        trained = engine(model, optimizer, int(kind[-1]))
        trained.backward(trained(torch.arange(LARGE[0])))
        trained.step()
    else:
        model(torch.arange(LARGE[0])).backward()
        optimizer.step()
    return sum(local(v).nbytes for s in optimizer.state.values() for k, v in s.items() if isinstance(v, Tensor))


def verdict(kind: str, world_size: int, found: Tensor, whole: Tensor) -> tuple[str, float]:
    """How the parameters of one layer compare, and their relative distance."""
    distance = float((found - whole).norm() / whole.norm())
    if torch.equal(found, whole):
        return "bit-exact", 0.0
    if distance < 1e-5:
        return "rounding", distance
    # A border cuts at most one row of a layer, and there is one border less than ranks.
    different = ((found - whole).abs() > 1e-5 * whole.abs().max()).view(len(whole), -1).any(1)
    if kind.startswith("zero") and int(different.sum()) <= world_size - 1:
        return "cut rows", distance
    return "per rank", distance


def exactness(ranks: dict[int, dict[str, Any]], whole: dict[str, Tensor]) -> dict[str, dict[str, tuple[str, float]]]:
    """The worst verdict for each layer and engine over all world sizes."""
    order = ["bit-exact", "rounding", "cut rows", "per rank"]
    table: dict[str, dict[str, tuple[str, float]]] = {}
    for world_size, found in ranks.items():
        for kind in ENGINES:
            for name, value in found[kind].items():
                layer = name.split(".")[0]
                old = table.setdefault(layer, {}).get(kind, ("bit-exact", 0.0))
                new = verdict(kind, world_size, value, whole[name])
                table[layer][kind] = max(old, new, key=lambda v: (order.index(v[0]), v[1]))
    return table


WORDS = {
    "bit-exact": "bit-exact",
    "rounding": "equal within {:.0e}",
    "cut rows": "equal, but for rows cut by a border",
    "per rank": "per-rank states, {:.1%} apart",
}


def other_seed(whole: dict[str, Tensor]) -> dict[str, float]:
    """For each layer, how far one process is from one process with another hash seed."""
    other = trained_alone(seed=1)
    return {name.split(".")[0]: float((other[name] - whole[name]).norm() / whole[name].norm()) for name in whole}


def exactness_table(found: dict[str, dict[str, tuple[str, float]]], seeds: dict[str, float]) -> str:
    columns = [*ENGINES.values(), "one process, another hash seed"]
    lines = [f"| codecs | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for layer, label in LABELS.items():
        cells = [WORDS[word].format(distance) for word, distance in (found[layer][kind] for kind in ENGINES)]
        cells.append(f"{seeds[layer]:.1%} apart" if layer in ("sketch", "sketched_rows") else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(ranks: dict[int, list[dict[str, Any]]], whole: dict[str, int]) -> str:
    """The fullest rank's bytes as a share of one process's, for every world size."""
    sizes = " / ".join(str(world_size) for world_size in ranks)
    lines = [
        f"| codecs | one process | {' | '.join(f'{name}: {sizes} ranks' for name in ENGINES.values())} |",
        "|---" * (2 + len(ENGINES)) + "|",
    ]
    for layer, label in LABELS.items():
        if layer not in whole:
            continue
        cells = []
        for kind in ENGINES:
            shares = [max(rank[f"{kind} bytes"][layer] for rank in found) / whole[layer] for found in ranks.values()]
            cells.append(" / ".join(f"{share:.3f}" for share in shares))
        lines.append(f"| {label} | {whole[layer]:,} B | {' | '.join(cells)} |")
    return "\n".join(lines)


def between(document: str, name: str) -> str:
    """What stands between the markers of a generated table."""
    match = re.search(rf"<!-- begin:{name} -->\n\n(.*?)\n\n<!-- end:{name} -->", document, re.S)
    assert match, name
    return match[1]


def main() -> None:
    from tests import demo_exactness  # needs Lightning, which takes seconds: not for the ranks that measure here

    torch.set_num_threads(1)
    ranks = {world_size: run_ranks(measure, world_size) for world_size in (2, 3, 4)}
    whole, bytes_whole = one_process()
    tables = {
        "exactness": exactness_table(exactness({n: found[0] for n, found in ranks.items()}, whole), other_seed(whole)),
        "memory": memory_table(ranks, bytes_whole),
        **demo_exactness.tables(),
    }
    document = DOCUMENT.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- begin:{name} -->\n\n", f"\n\n<!-- end:{name} -->"
        document = document.replace(begin + between(document, name) + end, begin + table + end)
    DOCUMENT.write_text(document)
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
