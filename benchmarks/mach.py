"""Classes hashed to meta-classes, several times over: the classifiers of MACH (Huang, Medini et al., 2018).

Each repetition hashes all classes to few meta-classes and trains a classifier of its own for these. A class scores
the mean of its meta-classes' probabilities. The count-sketch paper's section 6.4 trains such classifiers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """Words of a document -> scores of meta-classes: the mean of the words' rows, and one linear layer."""

    def __init__(self, words: int, width: int, classes: int, *, sparse: bool = True) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, width, mode="mean", sparse=sparse)
        self.classes = nn.Linear(width, classes)

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        """``ids`` of all documents' words one after the other, ``starts [documents]`` -> ``[documents, classes]``."""
        scores: Tensor = self.classes(F.relu(self.words(ids, starts)))
        return scores


def loss_of(scores: Tensor, document: Tensor, classes: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy to the classes of each document, all of a document's alike; the mean over documents.

    Args:
        scores: ``[documents, classes]``.
        document, classes, weight: ``[labels]``; the document that has a label, its meta-class, and one divided by how
            many labels the document has.
    """
    return -(scores.log_softmax(1)[document, classes] * weight).sum() / len(scores)


def probabilities(scores: list[Tensor], hashes: Tensor) -> Tensor:
    """Of classes, as their meta-classes' of all repetitions say: ``[documents, labels]``.

    Args:
        scores: of each repetition, ``[documents, classes]``.
        hashes: ``[repetitions, labels]``, the meta-class of each class.
    """
    total = torch.zeros(len(scores[0]), hashes.shape[1])
    for one, classes in zip(scores, hashes, strict=True):
        total += one.softmax(1)[:, classes]
    return total / len(scores)


def precision_and_recall(
    scored: Tensor, labels: list[Tensor], *, precision_at: tuple[int, ...], recall_at: int
) -> dict[str, list[float]]:
    """Of each document: the share of its best-scored labels that it has, and of its labels that are among the best.

    Args:
        scored: ``[documents, labels]``.
        labels: of each document the labels that it has.

    Returns:
        ``P@k`` for every k of `precision_at`, and ``R@recall_at``.
    """
    best = scored.topk(max(recall_at, *precision_at)).indices
    found = torch.stack([torch.isin(row, own) for row, own in zip(best, labels, strict=True)])
    counts = torch.tensor([len(own) for own in labels])
    shares = {f"P@{k}": found[:, :k].float().mean(1) for k in precision_at}
    shares[f"R@{recall_at}"] = found[:, :recall_at].sum(1) / counts
    return {name: values.tolist() for name, values in shares.items()}
