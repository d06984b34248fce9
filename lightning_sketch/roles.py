"""What a parameter is for in its model: embedding, softmax, hidden or other."""

from __future__ import annotations

import fnmatch
import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from lightning_sketch.sharding import global_shape, show_shards

Role = Literal["embedding", "softmax", "hidden", "other"]
ROLES: tuple[str, ...] = get_args(Role)

#: Roles a user gives: FQN pattern -> role; or "last_linear": the model's last ``nn.Linear`` is the softmax layer, which
#: is an error if another Linear has more outputs.
RoleHints = Mapping[str, str] | Literal["last_linear"] | None

# Put the model under ``module``.
_ROOT_WRAPPERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")

# Segments that wrappers put into names: torch.compile, FSDP, activation checkpointing, DDP ("module" in front only).
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass
class NamedLayer:
    """A parameter of a model.

    Args:
        fqn: its first name, without the segments that wrappers add.
        param: the parameter.
        module: the module that owns it.
        roles: one or more roles; a tied weight has those of all its uses.
        aliases: its other names (tied weights).
    """

    fqn: str
    param: nn.Parameter
    module: nn.Module
    roles: set[str] = field(default_factory=set)
    aliases: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logical parameter, however little of it is held here."""
        return global_shape(self.param)

    @property
    def names(self) -> list[str]:
        return [self.fqn, *self.aliases]


def clean_fqn(name: str, *, wrapped: bool = True) -> str:
    """A parameter's name without what wrappers put into it.

    Args:
        wrapped: whether a leading ``module.`` is a wrapper's (DDP), and not the model's own.

    >>> clean_fqn("module._orig_mod.encoder._checkpoint_wrapped_module.weight")
    'encoder.weight'
    """
    name = _WRAPPERS.sub("", name)
    name = name.removeprefix("module.") if wrapped else name
    return _WRAPPERS.sub("", name)


def matches_name(pattern: str, fqn: str) -> bool:
    """Whether an fnmatch pattern, or a regular expression after ``re:`` (searched), matches.

    >>> matches_name("*.mlp.*", "layers.0.mlp.fc.weight"), matches_name(r"re:mlp\\.fc", "layers.0.mlp.fc.weight")
    (True, True)
    """
    if pattern.startswith("re:"):
        return re.search(pattern[3:], fqn) is not None
    return fnmatch.fnmatchcase(fqn, pattern)


def check_pattern(pattern: str) -> None:
    """Raise ValueError if a ``re:`` pattern is not a regular expression."""
    try:
        re.compile(pattern[3:] if pattern.startswith("re:") else "")
    except re.error as error:
        raise ValueError(f"name={pattern!r} is not a regular expression: {error}") from None


def named_layers(model: nn.Module, role_hints: RoleHints = None) -> dict[int, NamedLayer]:
    """All parameters of `model` with their roles, by ``id(param)``, in ``named_parameters()`` order.

    Embedding: the weight of ``nn.Embedding`` and ``nn.EmbeddingBag``, and of Hugging Face's ``get_input_embeddings()``
    at any depth. Softmax: the weight of ``get_output_embeddings()`` and every matrix of
    ``nn.AdaptiveLogSoftmaxWithLoss``; a plain ``nn.Linear`` head only by `role_hints`, never by guess. Hidden: all
    other parameters of two or more dimensions. Other: vectors and scalars.

    Raises:
        ValueError: a hint names an unknown role or matches nothing.
    """
    show_shards(model)
    root = getattr(model, "_orig_mod", model)  # torch.compile around DDP
    wrapped = any(cls.__name__ in _ROOT_WRAPPERS for cls in type(root).__mro__)
    layers: dict[int, NamedLayer] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module._parameters.items():
            if param is None:
                continue
            fqn = clean_fqn(f"{path}.{name}" if path else name, wrapped=wrapped)
            if id(param) not in layers:
                layers[id(param)] = NamedLayer(fqn, param, module)
            elif fqn not in layers[id(param)].names:
                layers[id(param)].aliases.append(fqn)
    for param, role in _structural_roles(model):
        if id(param) in layers:
            layers[id(param)].roles.add(role)
    _apply_hints(layers, role_hints)
    for layer in layers.values():
        if not layer.roles:
            layer.roles.add("hidden" if len(layer.shape) >= 2 else "other")
    return layers


def find_model(names: Sequence[Sequence[str]], groups: Sequence[Mapping[str, Any]]) -> nn.Module | None:
    """The module of which an optimizer's parameters are the parameters by these names, among all that are alive.

    A copied or unpickled optimizer may have come before its model, and a parameter does not know its module.

    Args:
        names: for every group the FQNs of its parameters.
        groups: parameter groups.
    """
    if [len(own) for own in names] != [len(group["params"]) for group in groups]:
        return None
    wanted = [pair for own, group in zip(names, groups, strict=True) for pair in zip(own, group["params"], strict=True)]
    modules = (x for x in gc.get_objects() if wanted and issubclass(type(x), nn.Module))
    return next((m for m in modules if all(_parameter(m, name) is param for name, param in wanted)), None)


def _parameter(module: Any, fqn: str) -> nn.Parameter | None:
    *path, name = fqn.split(".")
    for part in path:  # attributes would evaluate what is parametrized
        module = vars(module).get("_modules", {}).get(part)
        if module is None:
            return None
    return vars(module).get("_parameters", {}).get(name)  # type: ignore[no-any-return]


def _structural_roles(model: nn.Module) -> Iterator[tuple[Any, str]]:
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield module.weight, "embedding"
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            for param in module.parameters():
                if param.ndim == 2:
                    yield param, "softmax"
        for getter, role in (("get_input_embeddings", "embedding"), ("get_output_embeddings", "softmax")):
            yield _hf_weight(module, getter), role


def _hf_weight(module: nn.Module, getter: str) -> Any:
    """The weight behind Hugging Face's getter, or None. PEFT puts the layer itself under ``base_layer``."""
    function = getattr(module, getter, None)
    if not callable(function):
        return None
    try:
        layer = function()
    except (NotImplementedError, AttributeError):  # transformers' base classes declare getters that many models lack
        return None
    return getattr(getattr(layer, "base_layer", layer), "weight", None)


def _apply_hints(layers: Mapping[int, NamedLayer], hints: RoleHints) -> None:
    if hints == "last_linear":
        linears = [x for x in layers.values() if isinstance(x.module, nn.Linear) and len(x.shape) == 2]
        most = max((x.shape[0] for x in linears), default=0)
        if not linears or linears[-1].shape[0] < most:
            raise ValueError(
                "role_hints='last_linear': the last nn.Linear must have the most outputs of all; name the softmax "
                "layer instead, e.g. role_hints={'head.weight': 'softmax'}"
            )
        linears[-1].roles.add("softmax")
        return
    for pattern, role in (hints or {}).items():
        if role not in ROLES:
            raise ValueError(f"role_hints[{pattern!r}]: unknown role {role!r}; roles are {', '.join(ROLES)}")
        matched = [x for x in layers.values() if any(matches_name(pattern, name) for name in x.names)]
        if not matched:
            raise ValueError(f"role_hints[{pattern!r}] matches no parameter; names look like {_some(layers)}")
        for layer in matched:
            layer.roles.add(role)


def _some(layers: Mapping[int, NamedLayer]) -> str:
    return ", ".join(repr(x.fqn) for x in list(layers.values())[:3])
