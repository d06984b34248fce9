"""Models, optimizers, policies, batches and dtypes as they are written on the command line."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sketch.policy.policy import Policy, as_policy
from lightning_sketch.policy.presets import PRESETS


def dtype_of(name: str) -> torch.dtype:
    """``"bf16"``, ``"bfloat16"`` and the like.

    Raises:
        ValueError: no dtype has that name.
    """
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype = getattr(torch, short.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype {name}: not a torch dtype")
    return dtype


def model_of(reference: str) -> nn.Module:
    """The model of ``module:function``, or of ``transformers:path/to/config.json``, on the meta device.

    Raises:
        ValueError: there is none.
    """
    source, _, what = reference.partition(":")
    # Modules are imported before: what they make at import may be needed, and torch 2.6's compiler is one of them.
    make = _of_config(what) if source == "transformers" else _named(source, what, "--model")
    with torch.device("meta"):
        model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {reference}: returned a {type(model).__name__}, not a module")
    return model


def optimizer_of(text: str, model: nn.Module) -> Optimizer:
    """The optimizer of ``"adamw"``, ``"sgd(momentum=0.9)"`` or ``"module:Class(option=1)"`` over a model's parameters.

    Raises:
        ValueError: it is no optimizer, or takes no such options.
    """
    name, opening, _ = text.partition("(")
    options: dict[str, Any] = {}
    if opening:
        try:
            call = ast.parse(f"f({text[len(name) + 1 :]}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError("options have names")
            options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"--optimizer {text}: write options like sgd(momentum=0.9): {error}") from error
    module, colon, attribute = name.partition(":")
    if colon:
        cls = _named(module, attribute, "--optimizer")
    else:
        known = {each.lower(): each for each in dir(torch.optim) if _is_optimizer(getattr(torch.optim, each))}
        if name.lower().replace("_", "") not in known:
            raise ValueError(f"--optimizer {name}: torch.optim has {', '.join(sorted(known))}")
        cls = getattr(torch.optim, known[name.lower().replace("_", "")])
    if not _is_optimizer(cls):
        raise ValueError(f"--optimizer {text}: {attribute} is no torch.optim.Optimizer")
    try:
        made: Optimizer = cls(model.parameters(), **options)
    except TypeError as error:
        raise ValueError(f"--optimizer {text}: {error}") from error
    return made


def policy_of(text: str, model: nn.Module, optimizer: Optimizer) -> Policy:
    """The policy of a preset's name, of a YAML file, or of ``"budget:24GiB"``.

    Raises:
        ValueError: there is none.
        OSError: the file cannot be read.
    """
    if text.startswith("budget:"):
        return Policy.for_budget(model, optimizer, text.removeprefix("budget:"))
    return named_policy(text, " nor budget:SIZE")


def named_policy(text: str, or_else: str = "") -> Policy:
    """The same without budgets; `or_else` ends the message of the error."""
    if text not in PRESETS and not text.endswith((".yaml", ".yml")):
        raise ValueError(f"--policy {text}: neither a preset ({', '.join(PRESETS)}) nor a .yaml file{or_else}")
    return as_policy(text)


def batch_of(text: str) -> dict[str, Tensor]:
    """Input ids and labels of ``"8x2048"``: sequences and their length. On the meta device.

    Raises:
        ValueError: it is no such pair of numbers.
    """
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--batch {text}: write sequences and their length, like 8x2048")
    ids = torch.empty([int(size) for size in sizes], dtype=torch.int64, device="meta")
    return {"input_ids": ids, "labels": ids}


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer


def _of_config(path: str) -> Callable[[], Any]:
    """What makes a Hugging Face model of the architecture that its configuration names."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"--model transformers:{path}: transformers is not installed ({error})") from error
    config = transformers.AutoConfig.from_pretrained(path)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None:
        return partial(transformers.AutoModelForCausalLM.from_config, config)
    return partial(named, config)


def _named(module: str, attribute: str, option: str) -> Any:
    sys.path.insert(0, "")  # a script beside the user, as python -m has it
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {module}:{attribute}: {error}") from error
