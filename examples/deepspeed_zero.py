"""DeepSpeed ZeRO: train a word model whose optimizer states are partitioned and compressed, save it, and go on.

python examples/deepspeed_zero.py --stage 3

Two processes, on CPUs too. The same as torchrun --standalone --nproc_per_node 2 examples/deepspeed_zero.py --stage 3
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import run

from lightning_sketch import Drop, Factored, Policy, Rule, compress, report

CONTEXT, DIM, BATCH, STEPS = 4, 32, 64, 100
POLICY = Policy(
    [Rule(role=("embedding", "softmax"), exp_avg=Drop(), exp_avg_sq=Factored(floor=1.0))],
    role_hints={"head.weight": "softmax"},  # a plain nn.Linear
)


class NextWord(nn.Module):
    """The last words -> the next one."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, DIM)
        self.hidden = nn.Linear(CONTEXT * DIM, DIM)
        self.head = nn.Linear(DIM, vocabulary)

    def forward(self, windows: Tensor) -> Tensor:
        """Windows of word ids, [batch, CONTEXT + 1] -> loss."""
        features = torch.tanh(self.hidden(self.table(windows[:, :-1]).flatten(1)))
        return nn.functional.cross_entropy(self.head(features), windows[:, -1])


def start(vocabulary: int, stage: int) -> tuple[Any, Any]:
    """DeepSpeed's engine around a new model, and the optimizer that it steps."""
    model = NextWord(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = compress(optimizer, model, POLICY)  # the one line, before deepspeed.initialize
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,  # DeepSpeed knows its own optimizers and torch's
        "zero_force_ds_cpu_optimizer": False,  # else optimizer offload insists on DeepSpeedCPUAdam
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 10**6,
            "allgather_bucket_size": 10**6,
            "stage3_param_persistence_threshold": 1000,  # parameters smaller than this stay whole
        },
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def train(engine: Any, text: Tensor, steps: range) -> float:
    """Mean loss over all ranks and the given steps."""
    total = torch.zeros((), device=engine.device)
    for step in steps:
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        loss = engine(text[torch.randint(len(text), (BATCH,), generator=generator)].to(engine.device))
        engine.backward(loss)
        engine.step()
        total += loss.detach() / len(steps)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def held(optimizer: Any) -> Iterator[str]:
    """What lies in this rank's flat tensors, in order."""
    for _, parts in optimizer.all_tensors():
        for part in parts:
            first, count, columns = part.shard.row_offset, part.shard.local_rows, part.shard.row_numel
            if not part.layer.compressed:
                yield f"{part.layer.shape[0]:,} elements of kept layers"
            elif part.shard.part_shape:
                yield f"{part.layer.fqn}: {columns} elements of row {first:,}"
            else:
                yield f"{part.layer.fqn}: rows {first:,} to {first + count - 1:,}"


def main(stage: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on CPUs, and only for inference
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed()
    words = re.findall(r"\w+|[^\w\s]", " ".join(text for _, text in sorted(topics.items())).lower())
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    text = torch.tensor([ids[word] for word in words]).unfold(0, CONTEXT + 1, 1)  # [positions, CONTEXT + 1]

    engine, optimizer = start(len(ids), stage)
    say(f"ZeRO-{stage}, {len(ids):,} words")
    for first in range(0, STEPS, 50):
        say(f"steps {first} to {first + 49}: loss {train(engine, text, range(first, first + 50)):.3f}")
    lines = [f"rank {dist.get_rank()}", *held(optimizer), str(report(engine.optimizer))]
    for rank_lines in gathered("\n  ".join(lines)):
        say(rank_lines)

    folder = gathered(tempfile.mkdtemp() if dist.get_rank() == 0 else "")[0]  # several machines need a shared one
    engine.save_checkpoint(folder, tag="here")
    gone_on = train(engine, text, range(STEPS, STEPS + 20))
    engine, optimizer = start(len(ids), stage)  # a new model and optimizer
    engine.load_checkpoint(folder, tag="here")
    resumed = train(engine, text, range(STEPS, STEPS + 20))
    say(f"loss of the next 20 steps {gone_on:.6f}, and from the checkpoint {resumed:.6f}")
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def gathered(value: str) -> list[str]:
    """Every rank's value."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        parser = argparse.ArgumentParser()
        parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
        main(parser.parse_args().stage)
        dist.destroy_process_group()
    else:
        run.main(["--standalone", "--nproc_per_node", "2", *sys.argv])
