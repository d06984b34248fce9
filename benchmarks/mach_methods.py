"""The optimizers of :mod:`benchmarks.extreme` and :mod:`benchmarks.extreme_memory`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Adagrad, Adam, Optimizer, SparseAdam

from benchmarks.mach import Classifier

BETA2 = 0.999
Policy = Callable[[Any], Any]  # the package -> a policy


@dataclass(frozen=True)
class Method:
    """A stock optimizer of all layers, and the policy that compresses its states.

    Args:
        family: of the optimizer. ``"sparse_adam"`` is `SparseAdam` for the words, whose gradients are sparse, and
            `Adam` for the rest; ``"adam"`` is `Adam` alone, which takes sparse gradients only where it is compressed.
        momentum: whether Adam has a first moment (beta1 = 0.9, else 0).
        in_backward: whether compressed layers are stepped in backward, and their gradients freed there.
    """

    label: str
    family: Literal["adam", "sparse_adam", "adagrad"]
    policy: Policy | None = None
    momentum: bool = True
    in_backward: bool = False

    @property
    def sparse(self) -> bool:
        """Whether the words' gradients are sparse."""
        return self.family != "adam" or self.policy is not None


def build(method: Method, model: nn.Module, *, lr: float) -> list[Optimizer]:
    """The optimizers of a model of one or more classifiers."""
    betas = (0.9 if method.momentum else 0.0, BETA2)
    if method.family == "sparse_adam":
        words = [module.words.weight for module in model.modules() if isinstance(module, Classifier)]
        rest = [weight for weight in model.parameters() if all(weight is not one for one in words)]
        return [SparseAdam(words, lr=lr, betas=betas), Adam(rest, lr=lr, betas=betas, fused=True)]
    optimizer: Optimizer
    if method.family == "adagrad":
        optimizer = Adagrad(model.parameters(), lr=lr)
    else:
        optimizer = Adam(model.parameters(), lr=lr, betas=betas, fused=True)
    if method.policy is None:
        return [optimizer]
    import lightning_sketch as ls

    return [ls.compress(optimizer, model, method.policy(ls), step_in_backward=method.in_backward)]


def _without_first(second: Callable[[Any], Any], **layers: Any) -> Policy:
    """These layers, as a rule selects them, without a first moment."""

    def policy(ls: Any) -> Any:
        return ls.Policy([ls.Rule(**layers, first_moment=ls.Drop(), second_moment=second(ls))])

    return policy


def _matrices(second: Callable[[Any], Any]) -> Policy:
    """The matrices of all layers."""
    return _without_first(second, name="*.weight")


def _words(second: Callable[[Any], Any]) -> Policy:
    """The words alone."""
    return _without_first(second, role="embedding")


def _tables(ls: Any) -> Any:
    return ls.Policy.preset("tables", role_hints={"*classes.weight": "softmax"})


def _paper(ls: Any) -> Any:
    return ls.CountSketch(compression=100, depth=3, update="paper")


METHODS: dict[str, Method] = {
    "sparse_adam": Method("SparseAdam and Adam, exact", "sparse_adam"),
    "adam": Method("Adam, exact, dense gradients", "adam"),
    "sparse_adam_b0": Method("SparseAdam and Adam, exact, beta1 = 0", "sparse_adam", momentum=False),
    "adagrad": Method("Adagrad, exact", "adagrad"),
    "paper": Method("the paper's count-min sketch, 1 %, no first moment", "adam", _matrices(_paper)),
    "sketch": Method(
        "CountSketch 100x, no first moment", "adam", _matrices(lambda ls: ls.CountSketch(compression=100, depth=3))
    ),
    "words": Method("RowWise of the words, no first moment; classes exact", "adam", _words(lambda ls: ls.RowWise())),
    "words_10": Method(
        "RowWise of the words in a 10x sketch, no first moment; classes exact",
        "adam",
        _words(lambda ls: ls.RowWise(10)),
    ),
    "words_100": Method(
        "RowWise of the words in a 100x sketch, no first moment; classes exact",
        "adam",
        _words(lambda ls: ls.RowWise(100)),
    ),
    "default": Method("default policy", "adam", lambda ls: ls.default_policy()),
    "default_all": Method("default policy, the classes named as a softmax layer", "adam", _tables),
    "default_in_backward": Method("the same, step_in_backward=True", "adam", _tables, in_backward=True),
    "rw": Method("RowWise, no first moment", "adam", _matrices(lambda ls: ls.RowWise())),
    "factored": Method("Factored, no first moment", "adam", _matrices(lambda ls: ls.Factored())),
}
