"""Extreme classification: which of thousands of names does a source file import?

Each name is hashed into one of 256 buckets, four times; a softmax for each hash learns the buckets, and a name's score
is the sum over its four. The other words of the file are rows of a large table with sparse gradients.

python examples/extreme_classification.py
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_sketch import Drop, Factored, Policy, RowWise, Rule, compress, report

FOLDERS = ("ao", "distributed", "fx", "nn", "_dynamo", "_inductor")  # of PyTorch's own source
DIM, HASHES, BUCKETS, BATCH, EPOCHS = 64, 4, 256, 32, 6
IMPORT = re.compile(r"(?m)^[ \t]*(?:from ([\w.]+) )?import (\([^)]*\)|.*)$")
POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=Drop(), exp_avg_sq=Factored(floor=1)),
        Rule(name="head.weight", exp_avg=Drop(), exp_avg_sq=RowWise()),  # a plain nn.Linear: found by name
    ]
)


def read() -> tuple[list[tuple[Tensor, Tensor]], int, int]:
    """Words and labels of every file, and how many of either there are. What every tenth file imports is no label."""
    paths = [path for folder in FOLDERS for path in sorted(Path(torch.__path__[0], folder).rglob("*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    imports = [{f"{m[0]}.{name}" for m in IMPORT.findall(text) for name in re.findall(r"\w+", m[1])} for text in texts]
    words = [sorted(set(re.findall(r"[A-Za-z_]\w\w+", IMPORT.sub("", text)))) for text in texts]
    counts = Counter(label for labels in imports for label in labels)
    classes = {x: i for i, x in enumerate(sorted(x for x, count in counts.items() if 2 <= count < len(texts) / 10))}
    rows = {word: i for i, word in enumerate(sorted(set().union(*words)))}
    ids = [([rows[x] for x in a], [classes[x] for x in b if x in classes]) for a, b in zip(words, imports, strict=True)]
    return [(torch.tensor(a), torch.tensor(b)) for a, b in ids if a and b], len(rows), len(classes)


class Classifier(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(words, DIM, mode="mean", sparse=True)
        self.head = nn.Linear(DIM, HASHES * BUCKETS)

    def forward(self, bags: list[Tensor]) -> Tensor:
        """Logarithms of the buckets' probabilities, [files, HASHES, BUCKETS]."""
        starts = torch.tensor([0, *map(len, bags[:-1])]).cumsum(0)
        return self.head(self.table(torch.cat(bags), starts)).view(-1, HASHES, BUCKETS).log_softmax(-1)


def main() -> None:
    torch.manual_seed(0)
    files, words, classes = read()
    buckets = torch.randint(BUCKETS, (classes, HASHES))
    held_out, train = torch.randperm(len(files)).tensor_split([len(files) // 5])
    model = Classifier(words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    optimizer = compress(optimizer, model, POLICY)  # the one line
    for epoch in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            scores = model([files[i][0] for i in batch])
            loss = -sum(scores[n, range(HASHES), buckets[files[i][1]]].mean() for n, i in enumerate(batch)) / BATCH
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            scores = model([files[i][0] for i in held_out])
        best = sum(scores[:, h, buckets[:, h]] for h in range(HASHES)).argmax(1)
        right = sum(int(label in files[i][1]) for label, i in zip(best, held_out, strict=True))
        print(f"epoch {epoch + 1}: P@1 {right / len(held_out):.3f}")
    print(report(optimizer), f"\n{classes:,} labels, {words:,} words, {len(train):,} files to learn from")


if __name__ == "__main__":
    main()
