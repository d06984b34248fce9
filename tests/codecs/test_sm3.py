"""SM3 against the paper, in plain Python loops over every element and every cover."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sketch import SM3
from lightning_sketch.codecs import allocate
from tests.codecs.harness import Driver, make_spec, scattered, sparse_steps

cases = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
VARIANTS = pytest.mark.parametrize("variant", ["I", "II"])
FLOAT64 = {"dtype": torch.float64, "param_dtype": torch.float64}


def test_variant_ii_worked_by_hand():
    driver = Driver(SM3(), make_spec((2, 3)))
    g2 = torch.tensor([[1.0, 4.0, 0.0], [9.0, 0.0, 1.0]])
    assert driver.step(g2).tolist() == g2.tolist()  # nothing is known yet
    # rows: max 4, 9; columns: max 9, 4, 1
    assert driver.tensors["exp_avg_sq_dim0"].tolist() == [4, 9]
    assert driver.tensors["exp_avg_sq_dim1"].tolist() == [9, 4, 1]
    # min(row, column) + g2: [[4+1, 4+0, 1+2], [9+0, 4+1, 1+0]]
    nu = driver.step(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
    assert nu.tolist() == [[5, 4, 3], [9, 5, 1]]
    assert driver.tensors["exp_avg_sq_dim0"].tolist() == [5, 9]
    assert driver.tensors["exp_avg_sq_dim1"].tolist() == [9, 5, 3]
    assert driver.step(torch.zeros(2, 3)).tolist() == [[5, 5, 3], [9, 5, 3]]


def test_variant_i_worked_by_hand():
    driver = Driver(SM3(variant="I"), make_spec((2, 3)))
    # rows += 4, 9; columns += 9, 4, 1
    nu = driver.step(torch.tensor([[1.0, 4.0, 0.0], [9.0, 0.0, 1.0]]))
    assert nu.tolist() == [[4, 4, 1], [9, 4, 1]]
    # rows += 2, 1 = 6, 10; columns += 1, 1, 2 = 10, 5, 3
    nu = driver.step(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
    assert nu.tolist() == [[6, 5, 3], [10, 5, 3]]
    assert driver.step(torch.zeros(2, 3)).tolist() == nu.tolist()


@VARIANTS
@cases
@given(shape=SHAPES, beta=st.sampled_from([None, 0.9, 0.5]), seed=st.integers(0, 2**32))
def test_any_rank_equals_the_paper_in_plain_python(variant, shape, beta, seed):
    driver, slow = Driver(SM3(variant=variant), make_spec(shape, **FLOAT64)), _SlowSM3(shape, variant)
    decay, weight = (1.0, 1.0) if beta is None else (beta, 1 - beta)
    for g2 in _squares(shape, steps=4, seed=seed):
        torch.testing.assert_close(driver.step(g2, decay=decay, weight=weight), slow.step(g2, decay, weight))


@cases
@given(shape=SHAPES, seed=st.integers(0, 2**32))
def test_true_sum_at_most_variant_ii_at_most_variant_i(shape, seed):
    first, second = (Driver(SM3(variant=variant), make_spec(shape, **FLOAT64)) for variant in ("I", "II"))
    true = torch.zeros(shape, dtype=torch.float64)
    slack = 1 - 1e-12
    for g2 in _squares(shape, steps=5, seed=seed):
        true += g2
        nu_one, nu_two = first.step(g2), second.step(g2)
        assert bool((true * slack <= nu_two).all())
        assert bool((nu_two * slack <= nu_one).all())


@VARIANTS
@pytest.mark.parametrize("shape", [(), (1,), (6,)], ids=str)
def test_vectors_and_scalars_are_plain_adagrad(variant, shape):
    driver, true = Driver(SM3(variant=variant), make_spec(shape)), torch.zeros(shape or (1,))
    for g2 in _squares(shape or (1,), steps=4, seed=0):
        true += g2.float()
        torch.testing.assert_close(driver.step(g2.float()), true)


@VARIANTS
def test_the_ema_variant_forgets_a_spike(variant):
    """A running maximum never would."""
    driver = Driver(SM3(variant=variant), make_spec((3, 4)))
    spike = torch.zeros(3, 4)
    spike[1, 2] = 0.5**2
    driver.ema(spike, beta=0.5)
    for _ in range(50):
        nu = driver.ema(torch.full((3, 4), 1e-10), beta=0.5)
    torch.testing.assert_close(nu, torch.full((3, 4), 1e-10), rtol=1e-3, atol=0)
    assert driver.state.max() < 1e-9


@VARIANTS
def test_absent_rows_keep_their_accumulator(variant):
    driver = Driver(SM3(variant=variant), make_spec((6, 4)))
    driver.step(torch.full((1, 4), 5.0), torch.tensor([1]))
    driver.step(torch.full((1, 4), 1.0), torch.tensor([3]))
    assert driver.tensors["exp_avg_sq_dim0"].tolist() == [0, 5, 0, 1, 0, 0]
    if variant == "II":  # columns were touched by row 1 and 3 only
        assert driver.tensors["exp_avg_sq_dim1"].tolist() == [5] * 4
    assert driver.state[:, 0].tolist() == [0, 5, 0, 1, 0, 0]


@VARIANTS
def test_absent_rows_decay_as_under_a_dense_gradient(variant):
    driver = Driver(SM3(variant=variant), make_spec((4, 2)))
    driver.ema(torch.full((1, 2), 16.0), torch.tensor([0]), beta=0.5)
    for _ in range(3):
        driver.ema(torch.full((1, 2), 64.0), torch.tensor([1]), beta=0.5)
    assert driver.tensors["exp_avg_sq_dim0"][0] * driver.tensors["exp_avg_sq_scale"] == 16 * 0.5 * 0.5**3


@VARIANTS
@pytest.mark.parametrize("beta", [None, 0.9])
def test_a_sparse_step_still_bounds_the_true_state(variant, beta):
    decay, weight = (1.0, 1.0) if beta is None else (beta, 1 - beta)
    driver, true = Driver(SM3(variant=variant), make_spec((20, 3))), torch.zeros(20, 3)
    for rows, x in sparse_steps(20, 3, steps=30, touched=4):
        nu = driver.step(x.square(), rows, decay=decay, weight=weight)
        true = decay * true + weight * scattered(x.square(), rows, 20)
        assert bool((nu >= true[rows] * (1 - 1e-5)).all())
        assert bool((driver.state >= true * (1 - 1e-5)).all())


@VARIANTS
def test_all_rows_given_sparsely_are_a_dense_step(variant):
    dense, sparse = (Driver(SM3(variant=variant), make_spec((5, 3))) for _ in range(2))
    for g2 in _squares((5, 3), steps=4, seed=1):
        torch.testing.assert_close(sparse.ema(g2.float(), torch.arange(5)), dense.ema(g2.float()))
    torch.testing.assert_close(sparse.state, dense.state)


@pytest.mark.parametrize("shape", [(), (7,), (7, 5), (7, 5, 3), (7, 5, 3, 2)], ids=str)
def test_the_state_is_one_number_per_slice(shape):
    tensors = allocate(SM3(), make_spec(shape))
    assert sum(t.numel() for t in tensors.values()) == (sum(shape) or 1) + 1  # and the scale


def test_without_momentum_there_is_no_buffer():
    assert not any("momentum" in key for key in allocate(SM3(), make_spec((3, 2))))
    assert allocate(SM3(momentum=0.9), make_spec((3, 2)))["exp_avg_sq_momentum"].shape == (3, 2)


@pytest.mark.parametrize("options", [{"variant": "III"}, {"momentum": 1.0}, {"momentum": -0.1}])
def test_options_are_validated(options):
    with pytest.raises(ValueError, match=rf"SM3\({next(iter(options))}="):
        SM3(**options)


def _squares(shape: tuple[int, ...], steps: int, seed: int) -> list[torch.Tensor]:
    """Squared gradients of very different sizes, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    present = torch.rand(steps, *shape, generator=generator) > 0.3
    return list(normal.pow(4) * present)


class _SlowSM3:
    """The paper's pseudo-code. A cover r is (dimension, index): all elements with that index in that dimension."""

    def __init__(self, shape: tuple[int, ...], variant: str) -> None:
        self.variant = variant
        self.elements = list(itertools.product(*map(range, shape)))
        self.mu = {(d, n): 0.0 for d, size in enumerate(shape) for n in range(size)}

    def step(self, g2: torch.Tensor, decay: float, weight: float) -> torch.Tensor:
        covers = {i: list(enumerate(i)) for i in self.elements}
        x = {i: weight * float(g2[i]) for i in self.elements}
        inside = {r: [i for i in self.elements if r in covers[i]] for r in self.mu}
        if self.variant == "I":
            self.mu = {r: decay * mu + max(x[i] for i in inside[r]) for r, mu in self.mu.items()}
            nu = {i: min(self.mu[r] for r in covers[i]) for i in self.elements}
        else:
            nu = {i: decay * min(self.mu[r] for r in covers[i]) + x[i] for i in self.elements}
            self.mu = {r: max(nu[i] for i in inside[r]) for r in self.mu}
        return torch.tensor([nu[i] for i in self.elements], dtype=torch.float64).view(g2.shape)
