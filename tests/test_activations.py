"""What a batch takes, counted on fake tensors, against what is allocated when the same model runs."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_sketch import estimate_memory
from lightning_sketch.activations import BatchBytes, batch_memory, track
from lightning_sketch.cli import main
from tests.profiled import peak_bytes

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 12_000,
    "tie_word_embeddings": True,
}  # fmt: skip


class Plain(nn.Module):
    """Takes rows of 64 numbers, and has a table, a mask that is a plain attribute, and a frozen layer."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.mask = torch.ones(64)
        self.first = nn.Linear(64, 256)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in range(3)
        )
        self.last = nn.Linear(256, 5_000).requires_grad_(False)
        self.recompute = recompute

    def forward(self, numbers):
        found = self.first(numbers * self.mask)
        for block in self.blocks:
            found = found + (checkpoint(block, found, use_reentrant=False) if self.recompute else block(found))
        return self.last(found)


def llama():
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


IDS = torch.zeros(4, 48, dtype=torch.int64)
NUMBERS = torch.zeros(96, 64)
WORDS = torch.arange(500)
MODELS = {
    "Hugging Face": (llama, {"input_ids": IDS, "labels": IDS}, lambda m: m(input_ids=IDS, labels=IDS).loss),
    "plain": (Plain, (NUMBERS,), lambda m: m(NUMBERS).sum()),
    "sparse gradients": (
        lambda: nn.Embedding(10_000, 64, sparse=True),
        (WORDS,),
        lambda m: m(WORDS).sum(),
    ),
    "checkpointing": (lambda: Plain(recompute=True), [NUMBERS], lambda m: m(NUMBERS).sum()),
}


@pytest.mark.parametrize("name", MODELS)
def test_fake_tensors_count_what_real_ones_take(name):
    make, batch, loss = MODELS[name]
    with torch.device("meta"):
        counted = batch_memory(make(), batch)
    model = make()
    tracked = track(model, lambda: loss(model))
    assert counted.gradients == pytest.approx(tracked.gradients, rel=0.05)
    assert counted.activations == pytest.approx(tracked.activations, rel=0.05)
    model.zero_grad()
    allocated = peak_bytes(lambda: loss(model).backward())
    assert counted.activations + counted.gradients == pytest.approx(allocated, rel=0.05)


def test_torchs_tracker_counts_the_same_where_it_can():
    """It fails where a parameter is frozen."""
    make, batch, loss = MODELS["Hugging Face"]
    model, tracker = make(), MemTracker()
    tracker.track_external(model)
    with tracker:
        loss(model).backward()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    kinds = {getattr(kind, "value", kind): count for kind, count in found.items()}
    counted = batch_memory(make(), batch)
    theirs = kinds["Total"] - kinds["Parameter"] - kinds["Buffer"]
    assert counted.activations + counted.gradients == pytest.approx(theirs, rel=0.01)


def test_recomputing_takes_less():
    many = torch.zeros(4_096, 64)
    found = [batch_memory(Plain(recompute=recompute), [many]).activations for recompute in (True, False)]
    assert found[0] < 0.8 * found[1]


def test_the_model_is_left_as_it_is_and_a_callable_gets_its_copy():
    model = nn.Linear(4, 4)
    held = {name: id(param) for name, param in model.named_parameters()}
    given = []

    def loss(copied):
        given.append(copied)
        return copied(torch.ones(8, 4)).sum()

    assert batch_memory(model, loss) == batch_memory(model, [torch.ones(8, 4)])
    assert given[0] is not model
    assert {name: id(param) for name, param in model.named_parameters()} == held
    assert all(param.grad is None for param in model.parameters())
    assert not model._forward_hooks


class Looks(nn.Linear):
    """Looks at the values that it is given."""

    def forward(self, numbers):
        return super().forward(numbers if numbers.sum() > 0 else -numbers)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Looks(4, 4), [torch.ones(2, 4)], "DataDependentOutputException"),
        (nn.LSTM(4, 4), [torch.ones(2, 3, 4)], "returned a tuple without a loss"),
        (nn.Linear(4, 4), {"input_ids": torch.ones(2, 4)}, "unexpected keyword argument 'input_ids'"),
        (nn.Linear(4, 4).requires_grad_(False), [torch.ones(2, 4)], "does not require grad"),
    ],
    ids=["looks at values", "no loss", "other inputs", "nothing to train"],
)
def test_what_cannot_run_is_refused_with_the_reason(model, batch, message):
    with pytest.raises(ValueError, match=r"activations cannot be counted.*Leave the batch out") as raised:
        batch_memory(model, batch)
    assert message in str(raised.value)


def test_estimates_add_what_a_batch_takes():
    with torch.device("meta"):
        model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    counted = batch_memory(model, [NUMBERS])
    (rank,) = estimate_memory(model, optimizer, batch=[NUMBERS]).ranks
    assert BatchBytes(rank.activations, rank.gradients_then) == counted
    assert rank.peak == rank.parameters + rank.state + max(rank.gradients, counted.activations + counted.gradients)
    (without,) = estimate_memory(model, optimizer).ranks
    assert without.peak == without.total == rank.total
    shares = [estimate_memory(model, optimizer, engine="fsdp2", world_size=n, batch=[NUMBERS]).ranks[0] for n in (1, 2)]
    assert shares[1].activations == shares[0].activations, "each rank has a batch"
    assert shares[1].gradients_then == pytest.approx(shares[0].gradients_then / 2, abs=1)


def test_plan_takes_sequences_and_their_length(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    arguments = ["plan", "--model", f"transformers:{path}", "--batch", "4x48"]
    assert main([*arguments, "--json"]) == 0
    (rank,) = json.loads(capsys.readouterr().out)["ranks"]
    assert rank["activations"] == batch_memory(llama(), {"input_ids": IDS, "labels": IDS}).activations
    assert main(arguments) == 0
    assert "activations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "8"], "--batch 8: write sequences and their length, like 8x2048"),
        (["--batch", "0x4"], "--batch 0x4: write sequences"),
        (["--batch", "2x4"], "activations cannot be counted: the model does not run on fake tensors"),
    ],
)
def test_plan_says_in_one_line_what_is_wrong(capsys, arguments, message):
    assert main(["plan", "--model", f"{__name__}:Plain", *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
