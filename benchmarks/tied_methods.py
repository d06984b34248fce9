"""The optimizers of :mod:`benchmarks.tied_transformer`: policies over a tied table and hidden layers, and peers.

Peers are AdamW of other libraries with states of 8 or 4 bits, at their defaults but for the size of blocks, which must
divide the table's, and CAME. What they find too small, or their blocks do not divide, stays in float32.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Adafactor, Adagrad, AdamW, Optimizer

from benchmarks.adagrad_momentum import AdagradMomentum

Rules = Callable[[Any], list[Any]]  # the package -> the policy's rules
Codec = Callable[[Any], Any]  # the package -> a codec


@dataclass(frozen=True)
class Method:
    """AdamW (or Adagrad, for SM3, or another optimizer beside it) and the rules that compress it."""

    label: str
    family: Literal["adam", "adagrad", "adagrad_momentum", "adafactor", "came"] = "adam"
    rules: Rules | None = None  # None: exact
    table_momentum: bool = True  # beta1 = 0.9 on the table; False: 0, with the stock class
    epsilons: tuple[float, ...] = ()  # of the table alone, to search, the first one first; empty: torch's, everywhere
    schedule: Literal["linear", "quadratic", "inverse_root"] = "linear"  # after the warm-up; see `tied_transformer`
    start_lr: float | None = None  # of the search; None: the family's
    peer: str = ""  # another library's class in place of torch's: its module and name
    peer_options: tuple[tuple[str, Any], ...] = ()

    @property
    def package(self) -> str:
        """The distribution of the peer; empty for none."""
        return self.peer.partition(".")[0]

    @property
    def version(self) -> str:
        """The peer's package and its version; empty for none."""
        return f"{self.package} {importlib.metadata.version(self.package)}" if self.peer else ""

    @property
    def is_installed(self) -> bool:
        return not self.peer or importlib.util.find_spec(self.package) is not None


def build(method: Method, model: nn.Module, table: nn.Embedding, *, lr: float, eps: float) -> Optimizer:
    """The optimizer of all parameters; the table is a group of its own."""
    rest = [parameter for parameter in model.parameters() if parameter is not table.weight]
    groups: list[dict[str, Any]] = [{"params": [table.weight]}, {"params": rest}]
    optimizer: Optimizer
    if method.peer:
        module, _, name = method.peer.rpartition(".")
        options = dict(method.peer_options) | ({"eps": eps} if method.family == "adam" else {})
        optimizer = getattr(importlib.import_module(module), name)(groups, lr=lr, **options)
    elif method.family == "adagrad":
        optimizer = Adagrad(groups, lr=lr, eps=eps)
    elif method.family == "adagrad_momentum":
        optimizer = AdagradMomentum(groups, lr=lr, eps=eps)
    elif method.family == "adafactor":
        optimizer = Adafactor(groups, lr=lr)  # its two eps are its own
    else:
        if not method.table_momentum:
            groups[0]["betas"] = (0.0, 0.999)
        if method.epsilons:
            groups[1]["eps"] = 1e-8
        optimizer = AdamW(groups, lr=lr, eps=eps, fused=True)
    if method.rules is None:
        return optimizer

    import lightning_sketch as ls

    return ls.compress(optimizer, model, ls.Policy(method.rules(ls)))


def _table(first: Codec | None, second: Codec) -> Rules:
    """Only the table is compressed; ``first=None`` keeps its first moment."""

    def rules(ls: Any) -> list[Any]:
        moments = {"second_moment": second(ls)} | ({} if first is None else {"first_moment": first(ls)})
        return [ls.Rule(role="embedding", min_rows=1_000, **moments)]

    return rules


def _hidden(first: Codec | None, second: Codec) -> Rules:
    """Only the matrices of the linear layers are compressed (they have no bias)."""

    def rules(ls: Any) -> list[Any]:
        moments = {"second_moment": second(ls)} | ({} if first is None else {"first_moment": first(ls)})
        return [ls.Rule(module=nn.Linear, **moments)]

    return rules


def _drop(ls: Any) -> Any:
    return ls.Drop()


def _bf16(ls: Any) -> Any:
    return ls.BFloat16()


def _row_wise(ls: Any) -> Any:
    return ls.RowWise()


def _row_wise_10(ls: Any) -> Any:
    return ls.RowWise(compression=10)


def _row_wise_100(ls: Any) -> Any:
    return ls.RowWise(compression=100)


def _floored(ls: Any, floor: float = 1.0) -> Any:
    return ls.Factored(floor=floor)


def _sketch(ls: Any) -> Any:
    return ls.CountSketch(compression=20, depth=3)


def _factored(ls: Any) -> Any:
    return ls.Factored()


def _sm3(ls: Any) -> Any:
    return ls.SM3(variant="II")


def _8bit(ls: Any) -> Any:
    return ls.Quantized(bits=8)


def _4bit(ls: Any) -> Any:
    return ls.Quantized(bits=4)


def _all_layers(first: Codec, second: Codec) -> Rules:
    """All tables, the one of places too, and the matrices of the linear layers."""
    return lambda ls: [ls.Rule(role=("embedding", "hidden"), first_moment=first(ls), second_moment=second(ls))]


def _preset(name: str) -> Rules:
    return lambda ls: list(ls.Policy.preset(name).rules)


def _everything(ls: Any) -> list[Any]:
    return _table(_bf16, _row_wise)(ls) + _hidden(_bf16, _bf16)(ls)


def _sm3_alone(variant: str) -> Rules:
    return lambda ls: [ls.Rule(name="*", sum=ls.SM3(variant, momentum=0.9))]


LARGER = (1e-4, 1e-5, 1e-3)

METHODS: dict[str, Method] = {
    "adamw": Method("AdamW, exact"),
    "adamw_b0": Method("AdamW, exact; beta1 = 0 on the table", table_momentum=False),
    "adamw_eps": Method("AdamW, exact; a larger eps on the table", epsilons=LARGER),
    "adamw_b0_eps": Method(
        "AdamW, exact; beta1 = 0 and a larger eps on the table", table_momentum=False, epsilons=LARGER
    ),
    "rw_drop": Method("table: RowWise, no first moment", rules=_table(_drop, _row_wise)),
    "rw_keep": Method("table: RowWise, first moment kept", rules=_table(None, _row_wise)),
    "rw_bf16": Method("table: RowWise, first moment BFloat16", rules=_table(_bf16, _row_wise)),
    "cs20_drop": Method("table: CountSketch 20x, no first moment", rules=_table(_drop, _sketch)),
    "cs20_keep": Method("table: CountSketch 20x, first moment kept", rules=_table(None, _sketch)),
    "everything": Method("table: RowWise, first moment BFloat16; hidden: BFloat16 of both moments", rules=_everything),
    "rw10_drop": Method("table: RowWise in a 10x sketch, no first moment", rules=_table(_drop, _row_wise_10)),
    "rw100_drop": Method("table: RowWise in a 100x sketch, no first moment", rules=_table(_drop, _row_wise_100)),
    "factored_bf16": Method("table: Factored, first moment BFloat16", rules=_table(_bf16, _factored)),
    "factored_drop": Method("table: Factored, no first moment", rules=_table(_drop, _factored)),
    "sm3_keep": Method("table: SM3-II (EMA), first moment kept", rules=_table(None, _sm3)),
    "bf16_both": Method("table: BFloat16 of both moments", rules=_table(_bf16, _bf16)),
    "hidden_bf16": Method("hidden: BFloat16 of both moments", rules=_hidden(_bf16, _bf16)),
    "hidden_factored": Method("hidden: Factored, first moment BFloat16", rules=_hidden(_bf16, _factored)),
    "hidden_8bit_factored": Method("hidden: Factored, first moment in 8 bits", rules=_hidden(_8bit, _factored)),
    "hidden_8bit_floored": Method("hidden: Factored(floor=1), first moment in 8 bits", rules=_hidden(_8bit, _floored)),
    "hidden_sm3": Method("hidden: SM3-II (EMA), first moment kept", rules=_hidden(None, _sm3)),
    "sm3_recipe": Method(
        "SM3-II with momentum 0.9 everywhere, its own schedule", "adagrad", _sm3_alone("II"), schedule="quadratic"
    ),
    "all_bf16": Method('all layers: BFloat16 of both moments (preset "bf16")', rules=_preset("bf16")),
    "all_bf16_factored": Method("all layers: Factored, first moment BFloat16", rules=_all_layers(_bf16, _factored)),
    "all_8bit": Method('all layers: 8 bits of both moments (preset "8bit")', rules=_preset("8bit")),
    "all_8bit_factored": Method("all layers: Factored, first moment in 8 bits", rules=_all_layers(_8bit, _factored)),
    "all_4bit": Method("all layers: 4 bits of both moments", rules=_all_layers(_4bit, _4bit)),
    "whole_model": Method(
        'table: Factored(floor=1), no first moment; hidden: Factored, first moment in 8 bits (preset "whole-model")',
        rules=_preset("whole-model"),
    ),
    "whole_floored": Method(
        "table: Factored(floor=1), no first moment; hidden: Factored(floor=1), first moment in 8 bits",
        rules=lambda ls: _table(_drop, _floored)(ls) + _hidden(_8bit, _floored)(ls),
    ),
    "floored_drop": Method("table: Factored(floor=1), no first moment", rules=_table(_drop, _floored)),
    "floored_less": Method(
        "table: Factored(floor=0.3), no first moment", rules=_table(_drop, lambda ls: _floored(ls, 0.3))
    ),
    "floored_more": Method(
        "table: Factored(floor=3), no first moment", rules=_table(_drop, lambda ls: _floored(ls, 3.0))
    ),
    "floored_8bit": Method("table: Factored(floor=1), first moment in 8 bits", rules=_table(_8bit, _floored)),
    "cs20_bf16": Method("table: CountSketch 20x, first moment BFloat16", rules=_table(_bf16, _sketch)),
    # The SM3 paper's optimizers, each by SM3's schedule (quadratic warm-up, then constant) and by AdamW's.
    "sm3_linear": Method(
        "SM3-II with momentum 0.9 everywhere, AdamW's schedule", "adagrad", _sm3_alone("II"), start_lr=0.05
    ),
    "sm3_1_recipe": Method(
        "SM3-I with momentum 0.9 everywhere, SM3's schedule",
        "adagrad",
        _sm3_alone("I"),
        schedule="quadratic",
        start_lr=0.05,
    ),
    "sm3_1_linear": Method(
        "SM3-I with momentum 0.9 everywhere, AdamW's schedule", "adagrad", _sm3_alone("I"), start_lr=0.05
    ),
    "adagrad_linear": Method("Adagrad with momentum 0.9, exact, AdamW's schedule", "adagrad_momentum", start_lr=0.025),
    "adagrad_recipe": Method(
        "Adagrad with momentum 0.9, exact, SM3's schedule", "adagrad_momentum", schedule="quadratic", start_lr=0.025
    ),
    "adafactor_linear": Method("torch's Adafactor, AdamW's schedule", "adafactor"),
    "adafactor_recipe": Method("torch's Adafactor, warm-up, then 1 / sqrt(step)", "adafactor", schedule="inverse_root"),
    "bnb_8bit": Method("all layers: bitsandbytes' AdamW8bit", peer="bitsandbytes.optim.AdamW8bit"),
    "ao_8bit": Method(
        "all layers: torchao's AdamW8bit, blocks of 128",
        peer="torchao.optim.AdamW8bit",
        peer_options=(("block_size", 128),),
    ),
    "ao_4bit": Method("all layers: torchao's AdamW4bit", peer="torchao.optim.AdamW4bit"),
    "came": Method("pytorch_optimizer's CAME", "came", peer="pytorch_optimizer.CAME"),
}
