"""What a parameter is for in its model: embedding, softmax, hidden or other."""

from __future__ import annotations

import fnmatch
import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lightning_sketch.layers.names import clean_modules
from lightning_sketch.sharding import global_shape, show_shards

Role = Literal["embedding", "softmax", "hidden", "other"]
ROLES: tuple[str, ...] = get_args(Role)

#: Roles a user gives: FQN pattern -> role; or "last_linear": the model's last ``nn.Linear`` is the softmax layer, which
#: is an error if another Linear has more outputs.
RoleHints = Mapping[str, str] | Literal["last_linear"] | None

#: What a user does about a lazy parameter.
RUN_FORWARD_FIRST = "run a forward pass of the model first, which gives lazy layers their shape"


@dataclass
class NamedLayer:
    """A parameter of a model.

    Args:
        fqn: its first name, without the segments that wrappers add.
        param: the parameter.
        module: the module that owns it; of a parametrized tensor's original, the module that has the tensor.
        roles: one or more roles; a tied weight has those of all its uses.
        aliases: its other names (tied weights, the name of the tensor that is computed from it).
        owners: every module that owns it, `module` the first.
        is_weight: whether it is the module's ``weight``, or what that is computed from in the same shape.
    """

    fqn: str
    param: nn.Parameter
    module: nn.Module
    roles: set[str] = field(default_factory=set)
    aliases: list[str] = field(default_factory=list)
    owners: list[nn.Module] = field(default_factory=list)
    is_weight: bool = False

    @property
    def lazy(self) -> bool:
        """Whether it has no shape before the model's first forward pass (``nn.LazyLinear``)."""
        return is_lazy(self.param)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logical parameter, however little of it is held here; ``()`` if it is lazy."""
        return () if self.lazy else global_shape(self.param)

    @property
    def names(self) -> list[str]:
        return [self.fqn, *self.aliases]

    @property
    def sparse(self) -> bool:
        """Whether its gradients are sparse: autograd makes a dense one as soon as one use of the weight is dense."""
        flags = [vars(owner).get("sparse", getattr(type(owner), "sparse", False)) for owner in self.owners]
        return bool(flags) and all(flag is True for flag in flags)  # a property of a user's module is no flag


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


def check_module(model: Any) -> None:
    """Refuse what is no module, as parameters or nothing.

    Raises:
        TypeError: so it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be the torch.nn.Module that has the parameters, got {type(model).__name__}")


def named_layers(model: nn.Module, role_hints: RoleHints = None) -> dict[int, NamedLayer]:
    """All parameters of `model` with their roles, by ``id(param)``, in ``named_parameters()`` order.

    Embedding: the weight of ``nn.Embedding`` and ``nn.EmbeddingBag``, and of ``get_input_embeddings()`` of a Hugging
    Face model (``transformers.PreTrainedModel``) at any depth. Softmax: the weight of its ``get_output_embeddings()``
    and every matrix of ``nn.AdaptiveLogSoftmaxWithLoss``; a plain ``nn.Linear`` head only by `role_hints`, never by
    guess. What PEFT trains in place of a table (the copy of ``modules_to_save``, the rows of ``TrainableTokens``) has
    the table's roles. Hidden: all other parameters of two or more dimensions. Other: vectors and scalars. A lazy
    parameter may become either.

    Where a weight is computed from other tensors (``spectral_norm``, ``weight_norm``, pruning and all of
    ``torch.nn.utils.parametrize``), the original has its role if it has the weight's shape; its name as a plain weight
    is an alias. Nothing is computed.

    Raises:
        TypeError: `model` is no module.
        ValueError: a hint names an unknown role or matches nothing.
    """
    check_module(model)
    show_shards(model)
    tables = _tables(model)
    layers: dict[int, NamedLayer] = {}
    for path, name, param, module, tensor in _parameters(model):
        fqn = _join(path, name)
        layer = layers.setdefault(id(param), NamedLayer(fqn, param, module))
        layer.aliases += [x for x in dict.fromkeys((fqn, _join(path, tensor))) if x not in layer.names]
        layer.owners.append(module)
        if tensor == "weight":
            layer.is_weight = True
            layer.roles |= tables.get(id(module), set())
    _apply_hints(layers, role_hints)
    for original, copy in _trained_copies(model):
        if id(original) in layers and id(copy) in layers:
            roles = layers[id(original)].roles | layers[id(copy)].roles
            layers[id(original)].roles |= roles
            layers[id(copy)].roles |= roles
    for layer in layers.values():
        if not layer.roles:
            layer.roles |= {"hidden", "other"} if layer.lazy else {"hidden" if len(layer.shape) >= 2 else "other"}
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


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, nn.Module, str]]:
    """Every parameter at every place, in ``named_parameters()`` order.

    Yields:
        the module's path; the parameter's name in it; the parameter; the module; and the name of the tensor in it that
        the parameter is, or that is computed from it in the same shape.
    """
    parametrized: dict[int, tuple[nn.Module, str]] = {}  # by the id of a ParametrizationList
    for path, module in clean_modules(model):
        if is_parametrized(module):
            for tensor, originals in module.get_submodule("parametrizations").named_children():
                parametrized[id(originals)] = module, tensor
        place = parametrized.get(id(module)) if isinstance(module, ParametrizationList) else None
        for name, param in module._parameters.items():
            if param is None:
                continue
            if place is None:
                yield path, name, param, module, _computed_from(module, name, param)
            else:
                owner, tensor = place
                inside = f"parametrizations.{tensor}"
                alone = name == "original"  # several (weight_norm's norms and directions) are original0, original1
                name = f"{inside}.{name}"
                same = _has_shape(owner, tensor, param, unknown=alone)
                yield path.removesuffix(inside).removesuffix("."), name, param, owner, tensor if same else name


def _computed_from(module: nn.Module, name: str, param: nn.Parameter) -> str:
    """The tensor that hooks compute from a parameter, in its shape: ``weight`` from ``weight_orig``, ``weight_v``.

    ``torch.nn.utils.spectral_norm``, ``weight_norm`` and ``prune`` leave it as a plain attribute.
    """
    for suffix in ("_orig", "_v"):
        tensor = name.removesuffix(suffix)
        if tensor != name and isinstance(module.__dict__.get(tensor), Tensor):
            return tensor if _has_shape(module, tensor, param, unknown=True) else name
    return name


def _has_shape(module: nn.Module, tensor: str, param: nn.Parameter, *, unknown: bool) -> bool:
    """Whether a parameter has the shape of the tensor that is computed from it, as the module's sizes say.

    Args:
        unknown: what to say where they do not.
    """
    sizes = {"weight": _weight_shape(module)}.get(tensor)
    return unknown if sizes is None else global_shape(param) == sizes


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return module.num_embeddings, module.embedding_dim
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None


def _tables(model: nn.Module) -> dict[int, set[str]]:
    """Roles of the weights of modules, by ``id(module)``."""
    found: dict[int, set[str]] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found.setdefault(id(module), set()).add("embedding")
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            for part in module.modules():
                found.setdefault(id(part), set()).add("softmax")
        if _is_hugging_face(module):
            for getter, role in (("get_input_embeddings", "embedding"), ("get_output_embeddings", "softmax")):
                for table in _hugging_face_tables(module, getter):
                    found.setdefault(id(table), set()).add(role)
    return found


def _is_hugging_face(module: nn.Module) -> bool:
    # By name: transformers is not imported here. Other modules have methods of these names for purposes of their own.
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.split(".")[0] == "transformers"
        for cls in type(module).__mro__
    )


def _hugging_face_tables(model: nn.Module, getter: str) -> Iterator[nn.Module]:
    """The module that a Hugging Face model's getter gives, and those that PEFT put in its place."""
    try:
        layer = getattr(model, getter)()
    except Exception:  # the base class raises for models without, and subclasses whatever they like
        return
    if not isinstance(layer, nn.Module):
        return
    yield layer
    for name in ("base_layer", "original_module", "modules_to_save"):
        inner = layer._modules.get(name)
        if inner is not None:
            yield from inner.children() if isinstance(inner, nn.ModuleDict) else (inner,)


def _trained_copies(model: nn.Module) -> Iterator[tuple[nn.Parameter | None, nn.Parameter]]:
    """What PEFT trains in place of a frozen layer or of some rows of a table, as (original parameter, trained one)."""
    for module in model.modules():
        children = module._modules
        copies, original = children.get("modules_to_save"), children.get("original_module")
        if isinstance(copies, nn.ModuleDict) and original is not None:
            originals = dict(original.named_parameters())
            for copy in copies.values():
                for name, param in copy.named_parameters():
                    yield originals.get(name), param
        deltas, table = children.get("trainable_tokens_delta"), children.get("base_layer")
        if isinstance(deltas, nn.ParameterDict) and table is not None:
            for delta in deltas.values():
                yield table._parameters.get("weight"), delta


def _apply_hints(layers: Mapping[int, NamedLayer], hints: RoleHints) -> None:
    if hints == "last_linear":
        linears = [x for x in layers.values() if isinstance(x.module, nn.Linear) and x.is_weight]
        if lazy := [x.fqn for x in linears if x.lazy]:
            raise ValueError(f"role_hints='last_linear': {', '.join(lazy)} has no shape yet; {RUN_FORWARD_FIRST}")
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
