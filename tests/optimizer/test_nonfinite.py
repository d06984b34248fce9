"""What becomes of gradients that are not finite: said in the step, or on accelerators when it is known."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from lightning_sketch import compress, decompress, report
from lightning_sketch.optimizer import nonfinite
from lightning_sketch.optimizer.nonfinite import LeftOut
from tests.ranks import run_ranks
from tests.test_bad_input import poison, without_first_row
from tests.tiny import ADAMW, CODECS, LOSSY, Tiny, assert_same, give_gradients, on_table, snapshot, train


class Event:
    """Stands for a device that is done when `done` says so."""

    done = True
    waited = 0

    def query(self) -> bool:
        return Event.done

    def synchronize(self) -> None:
        Event.waited += 1


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    """Counts come late, as from an accelerator."""
    monkeypatch.setattr(LeftOut, "is_late", staticmethod(lambda counts: True))
    monkeypatch.setattr(nonfinite, "_event", lambda device: Event())
    Event.done, Event.waited = True, 0
    return Event


def made(how: Any = "raise", codecs: str = "sketch") -> tuple[Tiny, Any]:
    model = Tiny()
    return model, compress(ADAMW.make(model.parameters()), model, on_table(**CODECS[codecs]), nonfinite=how)


def bad_step(model: Tiny, optimizer: Any, step: int = 9) -> Any:
    give_gradients(model, step)
    poison(model.table.weight, torch.nan)
    return optimizer.step()


@pytest.mark.parametrize("codecs", CODECS)
def test_sixty_steps_with_a_bad_row_in_every_tenth(codecs):
    """They end where a training without the updates of those rows ends."""
    (model, optimizer), (twin, expected) = made("skip", codecs), made("raise", codecs)
    twin.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(60):
            give_gradients(model, step)
            give_gradients(twin, step)
            if step % 10 == 9:
                poison(model.table.weight, (torch.nan, torch.inf, -torch.inf)[step // 10 % 3])
                if codecs == "bfloat16":  # by element
                    before = snapshot(twin, expected)
                    twin.table.weight.grad[0, 0] = 0.0
                else:
                    poison(twin.table.weight, torch.nan)
                    without_first_row(twin.table.weight)
            optimizer.step()
            expected.step()
            if step % 10 == 9 and codecs == "bfloat16":
                with torch.no_grad():
                    twin.table.weight[0, 0] = before["table.weight"][0, 0]
                    for name in ("exp_avg", "exp_avg_sq"):
                        expected.state[twin.table.weight][name][0, 0] = before[f"table.weight.{name}"][0, 0]
    assert report(optimizer).skipped == {"table.weight": 6}
    found, wanted = snapshot(model, optimizer), snapshot(twin, expected)
    if codecs in ("paper", "SM3-I momentum"):  # by the reference, whose arithmetic by rows differs in the last bit
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    else:
        assert_same(found, wanted)


def test_counts_of_an_accelerator_are_judged_when_the_next_step_begins(late):
    model, optimizer = made()
    train(model, optimizer, [0])
    bad_step(model, optimizer)
    after = snapshot(model, optimizer)
    calls = []
    with pytest.raises(FloatingPointError, match=r"table.weight \(1 row\) in an earlier step\. They were left out"):
        optimizer.step(lambda: calls.append(1))
    assert not calls, "before the closure makes other gradients"
    assert_same(snapshot(model, optimizer), after)
    train(model, optimizer, [1])  # it was said, and training goes on
    assert late.waited == 0


def test_a_step_does_not_wait_for_them(late):
    model, optimizer = made("skip")
    late.done = False
    for step in (0, 1, 2):
        bad_step(model, optimizer, step)
    assert not optimizer.compression.skipped
    late.done = True
    with pytest.warns(UserWarning, match="table.weight: 1 row left out of the step") as caught:
        train(model, optimizer, [3])
    assert [w.filename.rpartition("/")[2] for w in caught] == ["tiny.py"], "it points to who called step"
    assert late.waited == 0
    assert report(optimizer).skipped == {"table.weight": 3}


@pytest.mark.parametrize("look", [lambda o: o.state_dict(), report, decompress], ids=["state_dict", "report", "undo"])
def test_who_looks_at_the_states_waits_for_them(look, late):
    model, optimizer = made()
    late.done = False
    bad_step(model, optimizer)
    before = snapshot(model, optimizer)
    with pytest.raises(FloatingPointError, match="in an earlier step"):
        look(optimizer)
    assert late.waited == 1
    assert_same(snapshot(model, optimizer), before)
    look(optimizer)


def test_several_late_steps_are_one_error(late):
    model, optimizer = made()
    late.done = False
    bad_step(model, optimizer, 0)
    bad_step(model, optimizer, 1)
    train(model, optimizer, [2])
    with pytest.raises(FloatingPointError, match=r"table.weight \(2 rows\)"):
        report(optimizer)


def test_copies_and_pickles_do_not_carry_them(late):
    model, optimizer = made()
    bad_step(model, optimizer)
    pickled = io.BytesIO()
    torch.save(optimizer, pickled)
    pickled.seek(0)
    for other in (copy.deepcopy(optimizer), torch.load(pickled, weights_only=False)):
        report(other)
    with pytest.raises(FloatingPointError):
        report(optimizer)


def test_a_closure_that_raises_leaves_nothing_half_made(late):
    model, optimizer = made()
    train(model, optimizer, [0])
    before = snapshot(model, optimizer)

    def closure() -> None:
        give_gradients(model, 1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert_same(snapshot(model, optimizer), before)
    report(optimizer)  # nothing is pending


def test_nothing_is_left_out_under_propagate(late):
    model, optimizer = made("propagate")
    bad_step(model, optimizer)
    report(optimizer)
    assert model.table.weight[0].isnan().any()


def test_an_optimizer_that_is_converted_back_and_again_begins_anew(late):
    model, optimizer = made("skip")
    bad_step(model, optimizer)
    with pytest.warns(UserWarning, match="left out"):
        decompress(optimizer)
    compress(optimizer, model, LOSSY)
    assert not report(optimizer).skipped


def test_elements_are_counted_where_all_states_are_by_element():
    model, optimizer = made(codecs="bfloat16")
    give_gradients(model, 0)
    model.table.weight.grad[3, 1:3] = torch.inf
    model.table.weight.grad[4] = torch.nan
    before = model.table.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"table.weight \(6 elements\)"):
        optimizer.step()
    unchanged = model.table.weight == before
    assert unchanged.nonzero().tolist() == [[3, 1], [3, 2], [4, 0], [4, 1], [4, 2], [4, 3]]


def test_a_scaler_that_finds_inf_skips_the_whole_step():
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(model, optimizer)
    scaler.scale(torch.tensor(1.0))
    bad_step(model, type("Scaled", (), {"step": lambda self: scaler.step(optimizer)})())
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same(snapshot(model, optimizer), before)
    assert not report(optimizer).skipped


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_that_is_set_by_hand_skips_compressed_layers(found):
    model = Tiny()
    optimizer = compress(AdamW(model.parameters(), fused=True), model, LOSSY)
    optimizer.found_inf = torch.tensor(found)
    before = snapshot(model, optimizer)
    give_gradients(model, 0)
    optimizer.step()
    assert torch.equal(model.table.weight, before["table.weight"]) is bool(found)


def on_a_device(rank: int, world_size: int) -> dict[str, Any]:
    """Replicas whose counts come late, and later where the host is a step ahead of its device."""
    LeftOut.is_late = staticmethod(lambda counts: True)  # type: ignore[method-assign]
    nonfinite._event = lambda device: Event()  # type: ignore[assignment]
    Event.done = rank == 0
    torch.manual_seed(0)
    model, optimizer = made(codecs="rows")
    replica = DistributedDataParallel(model)
    raised = []
    for number in range(6):
        optimizer.zero_grad()
        replica(torch.arange(8) + number).square().sum().backward()
        if number == 2:
            poison(model.table.weight, torch.nan)
        try:
            optimizer.step()
        except FloatingPointError:
            raised.append(number)
    return {"raised": raised, "table": model.table.weight.detach().clone()}


@pytest.mark.distributed
def test_replicas_raise_in_the_same_step_and_stay_equal():
    first, second = run_ranks(on_a_device, 2)
    assert first["raised"] == second["raised"] == [3]
    assert torch.equal(first["table"], second["table"])
