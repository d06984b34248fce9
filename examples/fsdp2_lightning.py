"""Lightning with FSDP2: every process holds its part of each parameter, and that part's compressed states.

python examples/fsdp2_lightning.py, which starts two processes on the CPU
"""

from __future__ import annotations

import math
import re
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_sketch import BFloat16, Drop, Factored, Policy, RowWise, Rule, report
from lightning_sketch.integrations.lightning import OptimizerStateCompression

CONTEXT, DIM, PROCESSES = 4, 64, 2


class NextWord(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, DIM)
        self.hidden = nn.Sequential(nn.Linear(CONTEXT * DIM, 128), nn.GELU(), nn.Linear(128, DIM))
        self.output = nn.Linear(DIM, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        """Scores of the next word, [batch, vocabulary], after words [batch, CONTEXT]."""
        return self.output(self.hidden(self.table(words).flatten(1)))


class Training(L.LightningModule):
    """The loss of `NextWord`. Nothing here knows that states are compressed."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.model = NextWord(vocabulary)

    def configure_model(self) -> None:
        # By rows; shard_placement_fn=lambda p: Shard(1) would shard by columns.
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, windows: Tensor, index: int) -> Tensor:
        """Windows of word ids, [batch, CONTEXT + 1] -> loss."""
        return nn.functional.cross_entropy(self.model(windows[:, :-1]), windows[:, -1])

    def validation_step(self, windows: Tensor, index: int) -> None:
        self.log("loss", self.training_step(windows, index), batch_size=len(windows), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=Drop(), exp_avg_sq=Factored(floor=1.0)),
        Rule(name="model.output.weight", exp_avg=BFloat16(), exp_avg_sq=RowWise()),
    ]
)


def main() -> None:
    L.seed_everything(0, verbose=False)
    words = re.findall(r"\w+|[^\w\s]", " ".join(text for _, text in sorted(topics.items())))
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    windows = torch.tensor([ids[word] for word in words]).unfold(0, CONTEXT + 1, 1)  # [positions, CONTEXT + 1]
    cut = len(windows) * 9 // 10
    train, held_out = windows[torch.randperm(cut)].split(1024), windows[cut:].split(1024)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        # The default of data_parallel_size is the number of nodes: on one node, nothing would be sharded.
        strategy=ModelParallelStrategy(data_parallel_size=PROCESSES, tensor_parallel_size=1),
        callbacks=[OptimizerStateCompression(POLICY)],  # the only line that Lightning needs
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = [DataLoader(batches, batch_size=None) for batches in (train, held_out)]
    trainer.fit(Training(len(ids)), *loaders)
    measured = report(trainer.optimizers[0])
    print(f"rank {trainer.global_rank}: {measured.state:,} bytes of states for {measured.parameters:,} of parameters")
    if trainer.is_global_zero:
        print(measured)
        perplexity = math.exp(trainer.callback_metrics["loss"])
        print(f"perplexity on the held-out tenth {perplexity:.0f}, of {len(ids):,} words")


if __name__ == "__main__":
    main()
