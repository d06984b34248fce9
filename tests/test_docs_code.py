"""Every block of Python in the documentation runs, and every example by numbers comes out as written."""

from __future__ import annotations

import doctest
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import Trainer

import lightning_sketch
from lightning_sketch import BFloat16, Policy, RowWise, Rule, compress
from lightning_sketch.integrations.transformers import CompressedOptimizerFactory, compressed_optimizer
from tests.docs_code import PAGES, ROOT, blocks, run
from tests.gloo import one_thread
from tests.ranks import start_ranks

BLOCKS = [block for page in PAGES for block in blocks(page) if block.mark != "shared"]
TWO_PROCESSES, FROM = "two processes", "from "
#: Reasons why a block may not run.
NEEDS = ("a GPU", "several ranks", "bitsandbytes", "torchao")


class Model(nn.Module):
    """Has the layers and methods that fragments name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.block = nn.ModuleDict({"lora_A": nn.Linear(4, 4), "lora_B": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block["lora_B"](self.block["lora_A"](self.table(ids))))

    def resize_token_embeddings(self, rows: int) -> None:
        table = nn.Embedding(rows, 4)
        self.table.weight = table.weight

    def merge_and_reinit(self) -> None:
        """ReLoRA's."""


class SAM(torch.optim.Optimizer):
    """Holds an optimizer and calls its step."""

    def __init__(self, params: Any, base_optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = base_optimizer(self.param_groups, **options)


def _optimizer(names: dict[str, Any]) -> torch.optim.Optimizer:
    """Converted, with states; they lie in a checkpoint, too."""
    model = names.setdefault("model", Model())
    optimizer = compress(torch.optim.AdamW(model.parameters()), model, POLICY)
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, "checkpoint.pt")
    return optimizer


def _fabric(_: dict[str, Any]) -> Any:
    from lightning.fabric import Fabric

    return Fabric(devices=1, accelerator="cpu")


def _accelerator(_: dict[str, Any]) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def _args(_: dict[str, Any]) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True)


def _scheduler(_: dict[str, Any]) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), lambda step: 1.0)


def _module(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda _: __import__(name, fromlist=["*"])


def _public(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda _: getattr(lightning_sketch, name)


POLICY = Policy([Rule(role="embedding", first_moment=BFloat16(), second_moment=RowWise())])
#: What a fragment takes for granted: everything public, and objects of a training that is under way.
KNOWN: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{name: _public(name) for name in lightning_sketch.__all__},
    "torch": _module("torch"),
    "nn": _module("torch.nn"),
    "L": _module("lightning"),
    "OptimizerStateCompression": _public("OptimizerStateCompression"),
    "Trainer": lambda _: Trainer,
    "DPOTrainer": lambda _: Trainer,
    "deepspeed": _module("deepspeed"),
    "CompressedOptimizerFactory": lambda _: CompressedOptimizerFactory,
    "compressed_optimizer": lambda _: compressed_optimizer,
    "SAM": lambda _: SAM,
    "monitor": lambda _: lightning_sketch.Monitor(),
    "model": lambda _: Model(),
    "encoder": lambda _: Model(),
    "decoder": lambda _: Model(),
    "optimizer": _optimizer,
    "policy": lambda _: POLICY,
    "loader": lambda _: [torch.arange(4)] * 2,
    "criterion": lambda _: torch.sum,
    "scheduler": _scheduler,
    "steps": lambda _: 100,
    "step": lambda _: 0,
    "merge_every": lambda _: 10,
    "tokenizer": lambda _: range(24),
    "hidden_matrices": lambda names: [layer.weight for layer in names["model"].block.values()],
    "all_others": lambda names: [
        param for name, param in names["model"].named_parameters() if "block" not in name or param.ndim == 1
    ],
    "fabric": _fabric,
    "accelerator": _accelerator,
    "args": _args,
}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch) -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate keeps its state in the classes
    GradientState._reset_state()


@pytest.mark.parametrize("block", [b for b in BLOCKS if not b.mark], ids=str)
def test_blocks_run(block):
    run(block, KNOWN)


@pytest.mark.distributed
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == TWO_PROCESSES], ids=str)
def test_blocks_for_several_processes_run_on_two(block):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = start_ranks(_on_rank, (port, BLOCKS.index(block)), 2)
    while not context.join():
        pass


def _on_rank(rank: int, port: int, number: int) -> None:
    """What torchrun sets, and the block."""
    import deepspeed

    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in settings.items()}, DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    one_thread()
    # Else it is compiled, for more than a minute; only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    run(BLOCKS[number], KNOWN)


def test_a_block_that_does_not_run_says_what_it_needs():
    marks = {block.mark for block in BLOCKS} - {"", TWO_PROCESSES}
    assert {mark for mark in marks if not mark.startswith(FROM)} <= {f"not run: needs {what}" for what in NEEDS}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark.startswith(FROM)], ids=str)
def test_blocks_from_a_file_are_what_it_says(block):
    assert block.code in ROOT.joinpath(block.mark.removeprefix(FROM)).read_text()


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text()], ids=lambda page: page.stem)
def test_examples_by_numbers_come_out_as_written(page):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testfile(str(page), module_relative=False, optionflags=flags).failed == 0


def test_policies_in_yaml_are_read():
    texts = [text.split("```")[0] for page in PAGES for text in page.read_text().split("```yaml\n")[1:]]
    policies = [text for text in texts if text.startswith("rules:")]
    assert policies
    for text in policies:
        Policy.from_dict(yaml.safe_load(text))
