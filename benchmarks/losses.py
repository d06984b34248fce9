"""Softmax losses with their gradients written out: half of autograd's time and memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.precision import product_dtype


def sampled_softmax_loss(
    features: Tensor,
    target_rows: Tensor,
    negative_rows: Tensor,
    target: Tensor,
    negatives: Tensor,
    log_expected: Tensor,
) -> Tensor:
    r"""Mean cross-entropy of each target against itself and the shared negatives.

    Scores are corrected by the logarithm of how often a word is expected among the negatives
    (logQ); a negative that is the target itself is left out.

    Args:
        features: ``[batch, dim]``.
        target_rows: ``[batch, dim]``, softmax rows of ``target``.
        negative_rows: ``[negatives, dim]``, softmax rows of ``negatives``.
        target: ``[batch]`` word ids.
        negatives: ``[negatives]`` word ids, ascending, with repetitions.
        log_expected: ``[vocabulary]``.
    """
    loss: Tensor = _SampledSoftmax.apply(  # type: ignore[no-untyped-call]
        features, target_rows, negative_rows, target, negatives, log_expected
    )
    return loss


def softmax_loss(features: Tensor, table: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over all words; ``features [batch, dim]``, ``table [vocabulary, dim]``, ``target [batch]``."""
    loss: Tensor = _Softmax.apply(features, table, target)  # type: ignore[no-untyped-call]
    return loss


class _Softmax(torch.autograd.Function):
    """A few rows of scores at a time, so that they stay in cache; only exponentials are kept, ready for products."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, table: Tensor, target: Tensor) -> Tensor:
        batch, vocabulary = len(features), len(table)
        exponentials = features.new_empty(batch, vocabulary, dtype=product_dtype(features.device))
        total = features.new_empty(batch, 1)
        buffer = features.new_empty(_ROWS, vocabulary)
        loss = features.new_zeros(())
        for first in range(0, batch, _ROWS):
            some = slice(first, min(first + _ROWS, batch))
            scores = torch.mm(features[some], table.T, out=buffer[: some.stop - first])
            own = scores.gather(1, target[some, None])
            largest = scores.amax(1, keepdim=True)
            scores.sub_(largest).exp_()
            torch.sum(scores, 1, keepdim=True, out=total[some])
            loss += (total[some].log() + largest - own).sum()
            # The gradient's rows, times total: exponentials, less the total at the target.
            scores.scatter_add_(1, target[some, None], -total[some])
            exponentials[some] = scores
        ctx.save_for_backward(features, table, exponentials, total)
        return loss / batch

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, table, exponentials, total = ctx.saved_tensors
        scale = grad / (len(total) * total)  # [batch, 1]
        dtype = exponentials.dtype
        d_features = (exponentials @ table.to(dtype)).float() * scale
        d_table = (exponentials.T @ (features * scale).to(dtype)).float()
        return d_features, d_table, None


_ROWS = 64  # of scores computed at a time


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        target_rows: Tensor,
        negative_rows: Tensor,
        target: Tensor,
        negatives: Tensor,
        log_expected: Tensor,
    ) -> Tensor:
        own = (features * target_rows).sum(1) - log_expected[target]  # [batch]
        scores = features @ negative_rows.T  # [batch, negatives]
        scores -= log_expected[negatives]
        scores[_hits(target, negatives)] = -torch.inf
        largest = torch.maximum(scores.amax(1), own)
        scores.sub_(largest[:, None]).exp_()
        own_exp = (own - largest).exp()
        total = scores.sum(1) + own_exp
        ctx.save_for_backward(features, target_rows, negative_rows, scores, own_exp, total)
        return (total.log() + largest - own).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, target_rows, negative_rows, scores, own_exp, total = ctx.saved_tensors
        scale = (grad / (len(total) * total))[:, None]  # [batch, 1]; turns exponentials into gradients
        own = scale * (own_exp - total)[:, None]  # d loss / d own score
        d_features = (scores @ negative_rows) * scale + own * target_rows
        return d_features, own * features, scores.T @ (features * scale), None, None, None


def _hits(target: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Places ``(row, column)`` of the score matrix where the negative is the target."""
    first = torch.searchsorted(negatives, target)
    times = torch.searchsorted(negatives, target, right=True) - first  # [batch]
    row = torch.repeat_interleave(times)
    nth = torch.arange(len(row)) - (times.cumsum(0) - times)[row]
    return row, first[row] + nth
