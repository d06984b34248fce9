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
    """Some words' scores at a time, so that they stay in cache; only exponentials are kept, ready for products.

    Exponentials are relative to the largest score of the target and the first (commonest) words: a score 88 above that
    makes the loss infinite.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, table: Tensor, target: Tensor) -> Tensor:
        batch = len(features)
        chunks = torch.split(table, _CHUNK)
        exponentials = features.new_zeros(len(chunks), batch, _CHUNK, dtype=product_dtype(features.device))
        own = (features * table[target]).sum(1, keepdim=True)
        shift = torch.maximum(own, torch.mm(features, chunks[0].T).amax(1, keepdim=True))
        total = torch.zeros_like(own)
        buffer = features.new_empty(batch, _CHUNK)
        for words, kept in zip(chunks, exponentials, strict=True):
            scores = torch.mm(features, words.T, out=buffer[:, : len(words)])
            scores.sub_(shift).exp_()
            total += scores.sum(1, keepdim=True)
            kept[:, : len(words)] = scores
        # The gradient's rows, times total: exponentials, less the total at the target.
        at_target = target // _CHUNK, torch.arange(batch, device=target.device), target % _CHUNK
        exponentials[at_target] = ((own - shift).exp() - total).squeeze(1).to(exponentials.dtype)
        ctx.save_for_backward(features, table, exponentials, total)
        return (total.log() + shift - own).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, table, exponentials, total = ctx.saved_tensors
        dtype = exponentials.dtype
        scale = grad / (len(total) * total)  # [batch, 1]
        scaled = (features * scale).to(dtype).T.contiguous()
        d_features, d_table = torch.zeros_like(features), torch.empty_like(table)
        for words, kept, d_words in zip(
            torch.split(table, _CHUNK), exponentials, torch.split(d_table, _CHUNK), strict=True
        ):
            some = kept[:, : len(words)]
            d_features += some @ words.to(dtype)
            d_words.copy_((scaled @ some).T)
        return d_features * scale, d_table, None


_CHUNK = 512  # words scored at a time


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
