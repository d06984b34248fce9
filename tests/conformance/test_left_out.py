"""What is not finite is left out of a step as if a sparse gradient did not have it: rows, or of element-wise codecs
elements."""

from __future__ import annotations

from functools import partial

import torch

from tests.conformance.cases import NADAM, OPTIMIZERS, PARTS, Case, every, give
from tests.kernels.fused_cases import by_reference
from tests.rules.left_out import check


@every(PARTS)
def test_what_is_not_finite_is_absent_under_compiled_kernels(case: Case) -> None:
    check_left_out(case)


@every(PARTS, lambda case: case.layout in ("whole", "row shard"))
def test_what_is_not_finite_is_absent_under_the_reference(case: Case) -> None:
    with by_reference():
        check_left_out(case)


def check_left_out(case: Case) -> None:
    for shard in case.shards:
        *_, (values, rows) = case.gradients(shard, steps=2)
        some = values.clone()
        count = len(values)
        some.view(count, -1)[count // 2, 0] = torch.nan
        some.view(-1)[0], some.view(-1)[-1] = torch.inf, -torch.inf
        some[count // 3] = torch.nan
        nothing = [torch.full_like(values, torch.nan)] if case.layout == "whole" else []
        check(partial(case.part, shard), [some, *nothing], rows)


@every(OPTIMIZERS, lambda case: case.family == NADAM)
def test_without_a_rule_it_stays_in_its_row(case: Case) -> None:
    """Such gradients do what they do in the optimizer's own step, and to no row beside."""
    (shard,) = case.shards
    model, optimizer = case.converted(torch.ones(shard.local_shape))
    (values, _), *_ = case.gradients(shard)
    values[3, 2] = torch.nan
    for _ in range(2):
        give(model, (values, None))
        optimizer.step()
    assert model.weight.isfinite().all(dim=1).equal(torch.arange(shard.local_rows) != 3)
