"""Names of a model's parameters without what wrappers put into them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

#: By class of wrapper, by name because most are optional: the attributes that hold the model. Fabric's has two, of one
#: model with its strategy's wrapper and without.
_HOLDS_MODEL = {
    "OptimizedModule": ("_orig_mod",),  # torch.compile
    "DistributedDataParallel": ("module",),
    "DataParallel": ("module",),
    "FullyShardedDataParallel": ("_fsdp_wrapped_module",),
    "ActivationWrapper": ("_checkpoint_wrapped_module",),  # activation checkpointing and offloading
    "DeepSpeedEngine": ("module",),
    "_FabricModule": ("_forward_module", "_original_module"),
    "AbstractGradSampleModule": ("_module",),  # Opacus
}


def clean_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules(remove_duplicate=False)`` under the names that they have in the model without wrappers.

    >>> [name for name, _ in clean_modules(nn.ModuleDict({"part": nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))}))]
    ['', 'part', 'part', 'part.0']
    """
    clean: dict[str, str] = {}
    hidden: dict[str, tuple[str, ...]] = {}  # attributes of each module that are no part of a name
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, attribute = path.rpartition(".")
        above = clean.get(parent, "") if path else ""
        shown = "" if attribute in hidden.get(parent, ()) else attribute
        clean[path] = f"{above}.{shown}" if above and shown else above or shown
        hidden[path] = _attributes(module)
        yield clean[path], module


def _attributes(module: nn.Module) -> tuple[str, ...]:
    return next((_HOLDS_MODEL[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _HOLDS_MODEL), ())
