"""States that several ranks share: what a step adds to them, here and on all ranks together.

Where a layer is divided over ranks, some numbers of a state stand for elements on several of them: the mean square of a
row that is cut, the mean squares of columns, a sketch of the means of all rows. Before such a step begins every rank
writes what it adds (`CodecState.observe`) into a buffer, all ranks' buffers are added up, and `CodecState.begin` folds
the sums in. So the state is the one that a single process would keep, and the same on every rank that holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sharing:
    """How many numbers of a state the ranks agree on in a step; the same on all of them.

    Args:
        rows: whether one for each row that lies on several ranks.
        whole: how many for the layer as a whole.
        largest: whether they are the largest of all ranks', and not their sums.
        lazy: whether it is also to be known which of them any rank adds to.
    """

    rows: bool
    whole: int
    largest: bool = False
    lazy: bool = False


@dataclass(slots=True)
class Shared:
    """Views of the buffer in which ranks agree: first what this rank adds, then what all of them add.

    Args:
        rows: of the shard's rows, ``[local_rows]``; ``None`` if none of them lies on another rank, too.
        whole: of the layer as a whole, ``[n]``; ``None`` if there is nothing of the kind.
        all_rows: of all rows of the layer that lie on several ranks, ``[m]``, of which `rows` is a view.
        ids: their global ids, int64 ``[m]``, ascending; ``None`` for all rows in order.
        touched_rows, touched: how many ranks (rows, in a sketch) add to `rows` and to `whole`, if `Sharing.lazy`.
        all_touched: the same of `all_rows`.
    """

    rows: Tensor | None = None
    whole: Tensor | None = None
    all_rows: Tensor | None = None
    ids: Tensor | None = None
    touched_rows: Tensor | None = None
    touched: Tensor | None = None
    all_touched: Tensor | None = None
