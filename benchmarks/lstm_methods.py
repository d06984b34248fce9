"""The optimizers of :mod:`benchmarks.lstm_lm`: those of the count-sketch paper's tables, and ours beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop, SparseAdam

Family = Literal["momentum", "adam", "adagrad", "rmsprop"]
Codec = Callable[[Any], Any]  # the package -> a codec

#: By family: torch's default eps first; SGD has none.
EPSILONS: dict[Family, tuple[float, ...]] = {
    "momentum": (0.0,),
    "adam": (1e-8, 1e-6, 1e-5),
    "adagrad": (1e-10, 1e-5, 1e-4),
    "rmsprop": (1e-8, 1e-6, 1e-5),
}
BETAS = (0.9, 0.999)
ALPHA = 0.999  # of RMSprop
MOMENTUM = 0.9


@dataclass(frozen=True)
class Method:
    """A stock class and how the states of the sparse tables are stored.

    Args:
        paper: the row of the paper's table that it repeats, see `benchmarks.papers_tables`.
        first: codec of the first moment, or of the momentum; ``None``: exact.
        second: codec of the second moment; ``None``: exact.
        default: the default policy, in place of both.
        beta1: whether Adam has its first moment.
        dense: whether gradients of the tables are dense.
    """

    label: str
    softmax: Literal["full", "sampled"]
    family: Family
    paper: str = ""
    first: Codec | None = None
    second: Codec | None = None
    default: bool = False
    beta1: bool = True
    dense: bool = False

    @property
    def compressed(self) -> bool:
        return self.default or self.first is not None or self.second is not None


def build(
    method: Method, model: nn.Module, tables: list[Tensor], *, lr: float, eps: float, rest_lr: float | None
) -> list[Optimizer]:
    """The optimizer of the tables, then that of all other parameters.

    Args:
        rest_lr: of an Adam that steps the rest; ``None`` for the method's own class at its learning rate, as in the
            paper's tables 3 and 4.
    """
    known = {id(table) for table in tables}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    stepping: Optimizer
    if method.family == "adam":
        stepping = SparseAdam(tables, lr=lr, eps=eps, betas=(BETAS[0] if method.beta1 else 0.0, BETAS[1]))
    elif method.family == "adagrad":
        stepping = Adagrad(tables, lr=lr, eps=eps)
    elif method.family == "rmsprop":
        stepping = RMSprop(tables, lr=lr, eps=eps, alpha=ALPHA)
    else:
        stepping = SGD(tables, lr=lr, momentum=MOMENTUM)
    of_rest: Optimizer
    if rest_lr is None and method.family == "momentum":
        of_rest = SGD(rest, lr=lr, momentum=MOMENTUM)
    else:
        of_rest = Adam(rest, lr=lr if rest_lr is None else rest_lr, betas=BETAS, fused=True)
    if not method.compressed:
        return [stepping, of_rest]

    import lightning_sketch as ls

    policy = ls.default_policy()
    if not method.default:
        codecs = {"first_moment": method.first, "second_moment": method.second}
        made = {state: make(ls) for state, make in codecs.items() if make is not None}
        policy = ls.Policy([ls.Rule(role="embedding", **made)])
    return [ls.compress(stepping, model, policy), of_rest]


def _paper(**size: float) -> Codec:
    return lambda ls: ls.CountSketch(depth=3, update="paper", **size)


def _linear(**size: float) -> Codec:
    return lambda ls: ls.CountSketch(depth=3, **size)


def _touched(ls: Any) -> Any:
    """Every row exactly, and only touched rows decay: the optimizer that the paper's rule is a sketch of."""
    return ls.CountSketch(width=_ALL, lazy=True)


_ALL = 2**30  # at least as many buckets as any table has rows: no hashing


def _factored(ls: Any) -> Any:
    return ls.Factored()


def _drop(ls: Any) -> Any:
    return ls.Drop()


def _rows(**options: Any) -> Codec:
    return lambda ls: ls.RowWise(**options)


def _sketched(
    softmax: Literal["full", "sampled"], size: str, rule: str, make: Codec, paper: tuple[str, str]
) -> dict[str, Method]:
    """Adam with both moments sketched and with the second alone."""
    tag = f"{softmax}_adam_{rule}{size.split()[0]}"
    words = f"{size}, the {'paper' if rule == 'paper' else 'package'}'s rule"
    return {
        f"{tag}_mv": Method(f"Adam, both moments, {words}", softmax, "adam", paper[0], make, make),
        f"{tag}_v": Method(f"Adam, second moment, {words}", softmax, "adam", paper[1], None, make),
    }


#: In the order of the tables; each family begins with exact states.
METHODS: dict[str, Method] = {
    # Tables 9 (Adam), 6 (Adagrad) and 7 (RMSprop): a sampled softmax, both tables sparse.
    "sampled_adam": Method("Adam, exact", "sampled", "adam", "Adam"),
    **_sketched("sampled", "5x", "paper", _paper(compression=5), ("CS-MV", "CS-V")),
    **_sketched("sampled", "5x", "linear", _linear(compression=5), ("CS-MV", "CS-V")),
    "sampled_adam_low_rank": Method("Adam, second moment low-rank", "sampled", "adam", "LR-NMF-V", second=_factored),
    "sampled_adam_default": Method("Adam, default policy", "sampled", "adam", default=True),
    "sampled_adagrad": Method("Adagrad, exact", "sampled", "adagrad", "Adagrad"),
    "sampled_adagrad_5x": Method(
        "Adagrad, 5x (both rules are one: sums do not decay)", "sampled", "adagrad", "CS", second=_linear(compression=5)
    ),
    "sampled_adagrad_low_rank": Method("Adagrad, low-rank", "sampled", "adagrad", "LR-NMF", second=_factored),
    "sampled_adagrad_default": Method("Adagrad, default policy", "sampled", "adagrad", default=True),
    "sampled_rmsprop": Method("RMSprop, exact", "sampled", "rmsprop", "RMSprop", second=_touched),
    "sampled_rmsprop_paper5x": Method(
        "RMSprop, 5x, the paper's rule", "sampled", "rmsprop", "CMS", second=_paper(compression=5)
    ),
    "sampled_rmsprop_linear5x": Method(
        "RMSprop, 5x, the package's rule", "sampled", "rmsprop", "CMS", second=_linear(compression=5)
    ),
    "sampled_rmsprop_low_rank": Method("RMSprop, low-rank", "sampled", "rmsprop", "LR-NMF", second=_factored),
    "sampled_rmsprop_default": Method("RMSprop, default policy", "sampled", "rmsprop", default=True),
    "sampled_adam_rw": Method("Adam, RowWise, no first moment", "sampled", "adam", first=_drop, second=_rows()),
    "sampled_adagrad_rw": Method("Adagrad, RowWise", "sampled", "adagrad", second=_rows()),
    "sampled_rmsprop_rw": Method("RMSprop, RowWise", "sampled", "rmsprop", second=_rows()),
    "sampled_rmsprop_rw_lazy": Method(
        "RMSprop, RowWise, touched rows alone decay", "sampled", "rmsprop", second=_rows(lazy=True)
    ),
    "sampled_rmsprop_rw10_lazy": Method(
        "RMSprop, RowWise in a 10x sketch, touched rows alone decay",
        "sampled",
        "rmsprop",
        second=_rows(compression=10, lazy=True),
    ),
    "sampled_adam_rw10": Method(
        "Adam, RowWise in a 10x sketch, no first moment", "sampled", "adam", first=_drop, second=_rows(compression=10)
    ),
    "sampled_adam_rw100": Method(
        "Adam, RowWise in a 100x sketch, no first moment", "sampled", "adam", first=_drop, second=_rows(compression=100)
    ),
    "sampled_adagrad_rw10": Method(
        "Adagrad, RowWise in a 10x sketch", "sampled", "adagrad", second=_rows(compression=10)
    ),
    "sampled_rmsprop_rw10": Method(
        "RMSprop, RowWise in a 10x sketch", "sampled", "rmsprop", second=_rows(compression=10)
    ),
    "sampled_adam_b0": Method("Adam, exact, beta1 = 0", "sampled", "adam", beta1=False),
    # Tables 3 (momentum) and 4 (Adam): a full softmax, only the embedding is sparse; a sketch of [3, 16, dim].
    "full_momentum": Method("Momentum, exact", "full", "momentum", "Momentum", dense=True),
    "full_momentum_paper16": Method(
        "Momentum, [3, 16, 64], the paper's rule", "full", "momentum", "CS", _paper(width=16)
    ),
    "full_momentum_linear16": Method(
        "Momentum, [3, 16, 64], the package's rule", "full", "momentum", "CS", _linear(width=16)
    ),
    "full_momentum_default": Method("Momentum, default policy", "full", "momentum", default=True),
    "full_adam": Method("Adam, exact", "full", "adam", "Adam"),
    **_sketched("full", "16 buckets", "paper", _paper(width=16), ("CS-MV", "CS-V")),
    **_sketched("full", "16 buckets", "linear", _linear(width=16), ("CS-MV", "CS-V")),
    "full_adam_low_rank": Method("Adam, second moment low-rank", "full", "adam", "LR-NMF-V", second=_factored),
    "full_adam_default": Method("Adam, default policy", "full", "adam", default=True),
    "full_adam_rw10": Method(
        "Adam, RowWise in a 10x sketch, no first moment", "full", "adam", first=_drop, second=_rows(compression=10)
    ),
    **_sketched("full", "5x", "paper", _paper(compression=5), ("", "")),
    **_sketched("full", "5x", "linear", _linear(compression=5), ("", "")),
    "full_momentum_touched": Method("Momentum, exact, of touched rows alone", "full", "momentum", first=_touched),
    "full_momentum_paper5x": Method("Momentum, 5x, the paper's rule", "full", "momentum", first=_paper(compression=5)),
    "full_momentum_linear5x": Method(
        "Momentum, 5x, the package's rule", "full", "momentum", first=_linear(compression=5)
    ),
    "full_adam_b0": Method("Adam, exact, beta1 = 0 on the embedding", "full", "adam", beta1=False),
}
