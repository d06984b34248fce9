"""Rules, and ordered lists of them: which codec for which state of which layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from lightning_sketch.codecs import Codec, Keep, codec_from
from lightning_sketch.layers.roles import ROLES, NamedLayer, RoleHints, check_pattern, matches_name

FIRST, SECOND = "first_moment", "second_moment"
#: Names under which a rule gives codecs: torch's state names, and the two kinds of moment for all optimizers at once.
STATE_NAMES = ("exp_avg", "exp_avg_sq", "sum", "square_avg", "grad_avg", "momentum_buffer", FIRST, SECOND)

Match = Callable[[str, nn.Module, nn.Parameter], bool]
CodecLike = Codec | str | Mapping[str, Any] | None


@dataclass(frozen=True)
class Rule:
    """Codecs for the layers that all given selectors match. A rule without codecs keeps its layers exactly.

    Args:
        role: "embedding", "softmax", "hidden" or "other", or several of them.
        name: fnmatch pattern on the parameter's name, or ``"re:..."`` to search a regular expression, or several.
        module: class of the owning module, or its name.
        min_rows: least size of dimension 0.
        min_numel: least number of elements.
        sparse: ``True`` for tables whose modules all have ``sparse=True``, so that their gradients are sparse;
            ``False`` for every other parameter. A table that a module without the flag shares (a tied head) has dense
            gradients.
        match: any predicate ``(fqn, module, param) -> bool``. Such a policy cannot be written to YAML.
        exp_avg: codec for Adam, AdamW, SparseAdam.
        exp_avg_sq: codec for the same.
        sum: codec for Adagrad.
        square_avg: codec for RMSprop.
        grad_avg: codec for RMSprop.
        momentum_buffer: codec for SGD and RMSprop.
        first_moment: codec for every signed state not named above.
        second_moment: codec for every non-negative state not named above.
        states: codecs for states of other names, which optimizers without a rule of ours keep:
            ``{"exp_inf": "BFloat16"}``.
        optional: whether the rule may match no parameter, or name no state of the optimizer; else that is an error.

    A codec may be given as an object, a name (``"RowWise"``) or a dictionary
    (``{"codec": "RowWise", "compression": 10}``).

    Raises:
        ValueError: unknown role or codec, a negative size, or no boolean where one is wanted.

    >>> Rule(role="embedding", min_rows=10_000, exp_avg="Drop", exp_avg_sq="RowWise")
    Rule(role='embedding', min_rows=10_000, exp_avg=Drop(), exp_avg_sq=RowWise(compression=1.0, depth=3, lazy=False))
    """

    role: str | Sequence[str] | None = None
    name: str | Sequence[str] | None = None
    module: type[nn.Module] | str | None = None
    min_rows: int = 0
    min_numel: int = 0
    sparse: bool | None = None
    match: Match | None = None
    exp_avg: CodecLike = None
    exp_avg_sq: CodecLike = None
    sum: CodecLike = None
    square_avg: CodecLike = None
    grad_avg: CodecLike = None
    momentum_buffer: CodecLike = None
    first_moment: CodecLike = None
    second_moment: CodecLike = None
    states: Mapping[str, Any] = field(default_factory=dict, hash=False)
    optional: bool = False

    SELECTORS: ClassVar[tuple[str, ...]] = ("role", "name", "module", "min_rows", "min_numel", "sparse", "match")

    def __post_init__(self) -> None:
        for selector in ("role", "name"):
            given = getattr(self, selector)
            if not (given is None or (isinstance(given, Iterable) and all(isinstance(each, str) for each in given))):
                raise ValueError(f"Rule({selector}={given!r}): must be a string, or a list of strings")
        for role in _listed(self.role):
            if role not in ROLES:
                raise ValueError(f"Rule(role={role!r}): unknown role; roles are {', '.join(ROLES)}")
        if not callable(self.match or Rule):
            raise ValueError(f"Rule(match={self.match!r}): must be a function of name, module and parameter")
        for selector in ("role", "name"):  # the same rule however it was written: YAML gives lists
            if not isinstance(getattr(self, selector), str | None):
                object.__setattr__(self, selector, tuple(getattr(self, selector)))
            value = getattr(self, selector)
            if value in ("", ()):
                raise ValueError(f"Rule({selector}={value!r}): empty; leave it out to match any {selector}")
        for pattern in _listed(self.name):
            check_pattern(pattern)
        for size in ("min_rows", "min_numel"):
            if not isinstance(getattr(self, size), int):
                raise ValueError(f"Rule({size}={getattr(self, size)!r}): must be a whole number")
            if getattr(self, size) < 0:
                raise ValueError(f"Rule({size}={getattr(self, size)}): must be >= 0")
        if not isinstance(self.sparse, bool | None):
            raise ValueError(f"Rule(sparse={self.sparse!r}): must be True, False or None (either)")
        if not isinstance(self.optional, bool):
            raise ValueError(f"Rule(optional={self.optional!r}): must be True or False")
        for state in STATE_NAMES:
            if getattr(self, state) is not None:
                object.__setattr__(self, state, codec_from(getattr(self, state)))
        object.__setattr__(self, "states", _named_states(self.states))

    @property
    def codecs(self) -> dict[str, Codec]:
        """The codecs given, by state name."""
        return {s: getattr(self, s) for s in STATE_NAMES if getattr(self, s) is not None} | dict(self.states)

    @property
    def compresses(self) -> bool:
        """Whether any of its codecs is not `Keep`."""
        return any(not codec.exact for codec in self.codecs.values())

    @property
    def is_default(self) -> bool:
        """Whether the rule has no selector and so matches every layer."""
        return not self.selectors()

    @property
    def asks_shape(self) -> bool:
        """Whether the rule's match depends on the parameter's shape."""
        return bool(self.role or self.min_rows or self.min_numel)

    def selectors(self) -> dict[str, Any]:
        """The selectors given."""
        # Not by truth: sparse=False selects.
        return {s: getattr(self, s) for s in self.SELECTORS if getattr(self, s) != getattr(Rule, s)}

    def codec_for(self, state: str, *, signed: bool) -> Codec:
        """The codec of a state; `Keep` if the rule does not name it."""
        generic = FIRST if signed else SECOND
        codec: Codec = self.codecs.get(state) or self.codecs.get(generic) or Keep()
        return codec

    def misses(self, layer: NamedLayer) -> list[str]:
        """The selectors that do not match a layer; empty if the rule does, or might once a lazy layer has a shape."""
        shape = layer.shape
        passed = {
            "role": not self.role or any(role in layer.roles for role in _listed(self.role)),
            "name": not self.name or any(matches_name(p, n) for p in _listed(self.name) for n in layer.names),
            "module": self.module is None or _is_module(layer.module, self.module),
            "min_rows": layer.lazy or (shape[0] if shape else 1) >= self.min_rows,
            "min_numel": layer.lazy or math.prod(shape) >= self.min_numel,
            "sparse": self.sparse is None or layer.sparse == self.sparse,
        }
        missed = [selector for selector, ok in passed.items() if not ok]
        if self.match is not None and not missed and not _says_yes(self.match, layer):
            missed.append("match")
        return missed

    def to_dict(self) -> dict[str, Any]:
        """Primitives only.

        Raises:
            ValueError: the rule has a `match` function.
        """
        if self.match is not None:
            raise ValueError(
                "a rule with a match function cannot be written out; select by name, role or module instead"
            )
        selectors = {
            k: v if isinstance(v, str | int) else list(v) for k, v in self.selectors().items() if k != "module"
        }
        if self.module is not None:
            selectors["module"] = self.module if isinstance(self.module, str) else self.module.__name__
        given = {key: _written(value) for key, value in self._given_codecs().items()}
        return selectors | given | ({"optional": True} if self.optional else {})

    def describe(self) -> str:
        """The selectors as text, for tables and errors."""
        return ", ".join(f"{k}={_literal(v)}" for k, v in self.selectors().items()) or "default"

    def _given_codecs(self) -> dict[str, Any]:
        """The codecs as they are given to the constructor."""
        own: dict[str, Any] = {state: codec for state, codec in self.codecs.items() if state not in self.states}
        return own | ({"states": dict(self.states)} if self.states else {})

    def __repr__(self) -> str:
        given = self.selectors() | self._given_codecs() | ({"optional": True} if self.optional else {})
        return f"Rule({', '.join(f'{k}={_literal(v)}' for k, v in given.items())})"


@dataclass(frozen=True)
class RuleSet:
    """An ordered list of rules. The first that matches a layer decides; layers without a rule are kept exactly.

    Args:
        rules: `Rule` objects or their dictionaries.
        seed: global hash seed; every layer derives its own from it and its name.
        role_hints: roles that structure does not show: ``{"head.weight": "softmax"}``, or ``"last_linear"``.

    Raises:
        ValueError: no rules, two default rules, or rules behind the default one.
    """

    rules: Sequence[Rule]
    seed: int = 0
    role_hints: RoleHints = None

    def __init__(self, rules: Iterable[Rule | Mapping[str, Any]], seed: int = 0, role_hints: RoleHints = None) -> None:
        if isinstance(rules, Rule | Mapping | str) or not isinstance(rules, Iterable):
            raise ValueError(f"Policy({rules!r}): must be a list of rules, as Policy([Rule(...), Rule(...)])")
        object.__setattr__(self, "rules", tuple(r if isinstance(r, Rule) else _rule_from(r) for r in rules))
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "role_hints", role_hints)
        if not (role_hints is None or role_hints == "last_linear" or isinstance(role_hints, Mapping)):
            raise ValueError(f"role_hints={role_hints!r}: must map name patterns to roles, or be 'last_linear'")
        if not self.rules:
            raise ValueError("a policy needs at least one rule; to compress nothing, do not call compress")
        defaults = [i for i, rule in enumerate(self.rules, start=1) if rule.is_default]
        if len(defaults) > 1:
            raise ValueError(f"policy rules {defaults} have no selector: each claims to be the default, give one only")
        if defaults and defaults[0] != len(self.rules):
            raise ValueError(
                f"policy rule {defaults[0]} has no selector and takes every layer; it must be the last rule"
            )

    def rule_for(self, layer: NamedLayer) -> int | None:
        """The index of the rule that decides a layer: the first that matches it."""
        return next((index for index, rule in enumerate(self.rules) if not rule.misses(layer)), None)

    def assign(self, layers: Mapping[int, NamedLayer]) -> dict[int, int]:
        """The index of the deciding rule, by ``id(param)``; layers without a rule are absent.

        Raises:
            ValueError: a rule that is not optional decides no layer; says which layer came nearest.
        """
        assigned: dict[int, int] = {}
        for key, layer in layers.items():
            if (decided := self.rule_for(layer)) is not None:
                assigned[key] = decided
        for index, rule in enumerate(self.rules):
            if index not in assigned.values() and not rule.optional:
                raise ValueError(_unmatched(index, rule, layers))
        return assigned

    def unmatched(self, layers: Mapping[int, NamedLayer]) -> list[str]:
        """For each rule that decides no layer a sentence that says which layer came nearest."""
        deciding = set(self.assign(layers).values())
        return [_unmatched(i, rule, layers) for i, rule in enumerate(self.rules) if i not in deciding]

    def to_dict(self) -> dict[str, Any]:
        """Primitives only; the inverse of `from_dict`."""
        hints = dict(self.role_hints) if isinstance(self.role_hints, Mapping) else self.role_hints
        return {"rules": [rule.to_dict() for rule in self.rules], "seed": self.seed} | (
            {"role_hints": hints} if hints else {}
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """A policy from plain data, as YAML, Hydra or LightningCLI give it.

        >>> RuleSet.from_dict({"rules": [{"role": "embedding", "second_moment": "RowWise"}]}).rules[0].describe()
        "role='embedding'"

        Raises:
            ValueError: unknown keys or values.
        """
        unknown = set(value) - {"rules", "seed", "role_hints"}
        if unknown or not isinstance(value.get("rules"), Sequence) or isinstance(value["rules"], str):
            raise ValueError(
                f"a policy has the keys rules (a list), seed and role_hints; got {sorted(map(str, value))}"
            )
        return cls(value["rules"], value.get("seed", 0), value.get("role_hints"))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """A policy from a YAML file of the form that `from_dict` takes.

        Raises:
            ValueError: it is no YAML, or unknown keys or values.
            OSError: it cannot be read.
        """
        import yaml  # may be missing where a checkout runs that was never installed

        try:
            value = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: expected a mapping with the key 'rules', got {type(value).__name__}")
        return cls.from_dict(value)


def _rule_from(value: Mapping[str, Any]) -> Rule:
    known = {f.name for f in dataclasses.fields(Rule)}
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is no policy rule: must be a Rule, or a mapping of {', '.join(sorted(known))}")
    unknown = sorted(set(value) - known)
    if unknown:
        raise ValueError(f"a policy rule has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return Rule(**value)


def _written(value: Codec | Mapping[str, Codec]) -> dict[str, Any]:
    return value.to_dict() if isinstance(value, Codec) else {state: codec.to_dict() for state, codec in value.items()}


def _named_states(states: Any) -> dict[str, Codec]:
    if not isinstance(states, Mapping):
        raise ValueError(f"Rule(states={states!r}): must map names of states to codecs")
    for state, codec in states.items():
        if state in STATE_NAMES or not isinstance(state, str) or codec is None:
            raise ValueError(f"Rule(states={{{state!r}: {codec!r}}}): give Rule({state}=...) instead, or a codec")
    return {state: codec_from(codec) for state, codec in states.items()}


def _unmatched(index: int, rule: Rule, layers: Mapping[int, NamedLayer]) -> str:
    return f"policy rule {index + 1} ({rule.describe()}) matched no parameter; {_nearest(rule, layers)}"


def _nearest(rule: Rule, layers: Mapping[int, NamedLayer]) -> str:
    """What came nearest to a rule that decided nothing."""
    if not layers:
        return "the model has no parameters"
    # Fewest missed selectors first, then the largest.
    layer = min(layers.values(), key=lambda x: (len(rule.misses(x)), -math.prod(x.shape)))
    missed = rule.misses(layer)
    shape = layer.shape
    if not missed:
        return f"nearest is {layer.fqn!r}, which an earlier rule takes first"
    if "min_rows" in missed:
        fact = f"with {shape[0] if shape else 1:_} rows"
    elif "min_numel" in missed:
        fact = f"with {math.prod(shape):_} elements"
    elif missed == ["sparse"]:
        fact = f"of modules with{'' if layer.sparse else 'out'} sparse=True"
    else:
        fact = f"of role {'/'.join(sorted(layer.roles))}, {type(layer.module).__name__}, shape {list(shape)}"
    return f"nearest is {layer.fqn!r} {fact} (missed: {', '.join(missed)})"


def _says_yes(match: Match, layer: NamedLayer) -> bool:
    try:
        return match(layer.fqn, layer.module, layer.param)
    except Exception:  # whatever a predicate of the user's raises
        if layer.lazy:  # asked for the shape, which is not known yet
            return True
        raise


def _is_module(module: nn.Module, wanted: type[nn.Module] | str) -> bool:
    if isinstance(wanted, str):
        return any(cls.__name__ == wanted for cls in type(module).__mro__)
    return isinstance(module, wanted)


def _listed(value: str | Sequence[str] | None) -> Sequence[str]:
    return (value,) if isinstance(value, str) else (value or ())


def _literal(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}"
    return value.__name__ if isinstance(value, type) else repr(value)
