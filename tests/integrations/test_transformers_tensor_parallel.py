"""transformers' own tensor parallelism, alone and under its FSDP2: the default policy trains as in one process."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_sketch import compress, report
from tests.ranks import run_ranks

distributed = pytest.importorskip("transformers.distributed", reason="transformers of this version divides no models")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        "tp_size" not in inspect.signature(distributed.DistributedConfig).parameters,
        reason="transformers of this version divides no models by DistributedConfig",
    ),
]

ROWS, STEPS = 10_000, 3  # the default policy's tables
#: Replicas of the model, each over two ranks.
REPLICAS = (1, 2)
every_layout = pytest.mark.parametrize("replicas", REPLICAS)
every_head = pytest.mark.parametrize("tied", [True, False])


def config(tied: bool) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaConfig(vocab_size=ROWS, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)


def step(model: Any, optimizer: Any, number: int, replicas: list[int]) -> None:
    optimizer.zero_grad()
    for replica in replicas:
        words = torch.randint(ROWS, (2, 8), generator=torch.Generator().manual_seed(10 * number + replica))
        (model(input_ids=words, labels=words).loss / len(replicas)).backward()
    optimizer.step()


def on_rank(rank: int, world_size: int, path: str) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    layout = distributed.DistributedConfig(fsdp_size=world_size // 2, tp_size=2)
    found = {}
    for tied in (True, False):
        model = LlamaForCausalLM.from_pretrained(f"{path}/{tied}", distributed_config=layout, dtype=torch.float32)
        optimizer = compress(torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False), model)
        for number in range(STEPS):
            step(model, optimizer, number, [rank // 2])
        weights = {name: full(param) for name, param in model.named_parameters()}
        found[str(tied)] = {"weights": weights, "held": report(optimizer).state_by_codec["Factored"]}
    return found


def full(param: Any) -> Tensor:
    whole: Tensor = param.full_tensor() if hasattr(param, "full_tensor") else param
    return whole.detach().clone()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        torch.manual_seed(0)
        LlamaForCausalLM(config(tied)).save_pretrained(Path(path, str(tied)))
    return {replicas: run_ranks(on_rank, 2 * replicas, str(path)) for replicas in REPLICAS}


@every_layout
@every_head
def test_the_default_policy_trains_as_in_one_process(ranks, replicas, tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(tied))
    optimizer = compress(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    for number in range(STEPS):
        step(model, optimizer, number, list(range(replicas)))
    for rank in ranks[replicas]:
        for name, param in model.named_parameters():
            torch.testing.assert_close(rank[str(tied)]["weights"][name], param.detach(), rtol=1e-3, atol=1e-4)


@every_layout
@every_head
def test_every_rank_holds_its_share_of_rows(ranks, replicas, tied):
    tables = 1 if tied else 2
    expected = tables * (4 * (ROWS // (2 * replicas) + 16) + 8)  # rows, columns, scale
    assert [rank[str(tied)]["held"] for rank in ranks[replicas]] == [expected] * 2 * replicas
