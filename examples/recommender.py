"""Recommender: which names does a source file use? Two tables with sparse gradients, learned from what was observed.

Files are the users and names the items. Of each file one name is held out, and looked for among 99 others, drawn by how
often they are used: by chance it is among the first ten once in ten times.

python examples/recommender.py
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_sketch import Drop, Factored, Policy, Rule, compress, report

FOLDERS = ("ao", "distributed", "fx", "nn", "_dynamo", "_inductor")  # of PyTorch's own source
DIM, BATCH, STEPS = 32, 4096, 300
POLICY = Policy([Rule(role="embedding", exp_avg=Drop(), exp_avg_sq=Factored(floor=1.0))])


def observed() -> tuple[Tensor, int, int]:
    """Pairs of file and name, [pairs, 2]; how many files and names there are."""
    paths = [path for folder in FOLDERS for path in sorted(Path(torch.__path__[0], folder).rglob("*.py"))]
    files = [sorted(set(re.findall(r"[A-Za-z_]\w\w+", path.read_text(encoding="utf-8")))) for path in paths]
    counts = Counter(name for names in files for name in names)
    ids = {name: i for i, name in enumerate(name for name, count in counts.items() if count > 1)}
    pairs = [(file, ids[name]) for file, names in enumerate(files) for name in names if name in ids]
    return torch.tensor(pairs), len(files), len(ids)


class Recommender(nn.Module):
    def __init__(self, files: int, names: int) -> None:
        super().__init__()
        self.files = nn.Embedding(files, DIM, sparse=True)
        self.names = nn.Embedding(names, DIM, sparse=True)
        for table in (self.files, self.names):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, files: Tensor, names: Tensor) -> Tensor:
        """Scores of pairs of ids."""
        return (self.files(files) * self.names(names)).sum(-1)


def main() -> None:
    torch.manual_seed(0)
    pairs, files, names = observed()
    pairs = pairs[torch.randperm(len(pairs))]
    held_out = list({file: n for n, file in enumerate(pairs[:, 0].tolist())}.values())  # the last pair of each file
    train = pairs[torch.ones(len(pairs)).index_fill(0, torch.tensor(held_out), 0) == 1]
    held, others = pairs[held_out], train[torch.randint(len(train), (len(held_out), 99)), 1]

    model = Recommender(files, names)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.02)
    optimizer = compress(optimizer, model, POLICY)  # the one line
    for step in range(STEPS + 1):
        if step % 100 == 0:
            with torch.no_grad():
                scores = model(held[:, :1], torch.cat([held[:, 1:], others], dim=1))
            print(f"step {step}: hit rate {((scores[:, 1:] >= scores[:, :1]).sum(1) < 10).float().mean():.3f}")
        file, name = train[torch.randint(len(train), (BATCH,))].T
        other = train[torch.randint(len(train), (BATCH,)), 1]
        loss = -nn.functional.logsigmoid(model(file, name) - model(file, other)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = report(optimizer)
    print(found, f"\n{found.state:,} bytes of states; of SparseAdam {found.dense_state:,}")


if __name__ == "__main__":
    main()
