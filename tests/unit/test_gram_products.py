"""Parts, products, factors and inverses of a Gram: the same numbers as by whole matrices, and in their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structprune.errors import NumericalError
from structprune.linalg import gram_products
from structprune.linalg.cholesky import damped_cholesky, factored, inverted, solved
from structprune.linalg.obs import compacted
from structprune.memory import PeakMeter

_MIB = 2**20


@pytest.fixture(autouse=True)
def narrow_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of a few rows, so that the tests' small matrices have several."""
    monkeypatch.setattr(gram_products, "_STRIP_BYTES", 8 * 30 * 4)
    assert gram_products.strip_rows(30, 30) == 4


def problem(order: int = 30, outputs: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(200, order, generator=generator)
    return torch.randn(outputs, order, generator=generator), x_TI.T @ x_TI


ROWS, COLUMNS = torch.tensor([0, 3, 4, 9, 28]), torch.tensor([1, 2, 5, 7, 8, 11, 20, 29])


def test_parts_and_products() -> None:
    weight_OI, gram_II = problem()
    wide_II = gram_II.double()
    assert torch.equal(gram_products.block_of(gram_II, ROWS, COLUMNS), wide_II[ROWS][:, COLUMNS])
    product = weight_OI[:, ROWS].double() @ wide_II[ROWS][:, COLUMNS]
    torch.testing.assert_close(gram_products.times_gram(weight_OI[:, ROWS], gram_II, ROWS, COLUMNS), product)
    torch.testing.assert_close(gram_products.times_gram(weight_OI, gram_II, None, None), weight_OI.double() @ wide_II)
    energy = float((weight_OI.double() @ wide_II * weight_OI).sum())
    assert gram_products.output_energy(weight_OI, gram_II) == pytest.approx(energy, rel=1e-12)
    energy = float((weight_OI[:, COLUMNS].double() @ wide_II[COLUMNS][:, COLUMNS] * weight_OI[:, COLUMNS]).sum())
    assert gram_products.output_energy(weight_OI[:, COLUMNS], gram_II, COLUMNS) == pytest.approx(energy, rel=1e-12)
    torch.testing.assert_close(gram_products.column_energies(weight_OI), weight_OI.double().square().sum(dim=0))


@pytest.mark.parametrize("local", [True, False])
def test_fitting_error_is_the_sum_over_tokens(local: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x_TI, y_TO = (torch.randn(100, n, generator=generator, dtype=torch.float64) for n in (30, 5))
    original_OI = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    weight_OK = torch.randn(5, len(COLUMNS), generator=generator, dtype=torch.float64)
    if local:
        y_TO = x_TI @ original_OI.T
    target_OI = None if local else y_TO.T @ x_TI
    energy = float(y_TO.square().sum())
    found = gram_products.fitting_error(weight_OK, COLUMNS, original_OI, x_TI.T @ x_TI, target_OI, energy)
    assert found == pytest.approx(float((x_TI[:, COLUMNS] @ weight_OK.T - y_TO).square().sum()), rel=1e-9)


def test_factor_solution_and_inverse() -> None:
    weight_OI, gram_II = problem()
    wide_II = gram_II.double()
    factor = damped_cholesky(gram_II, 0.1, "test")
    assert torch.equal(gram_II.double(), wide_II)
    damped_II = wide_II + factor.delta * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(factor.factor_NN, torch.linalg.cholesky(damped_II))
    right_OI = weight_OI.double()
    torch.testing.assert_close(
        solved(factor.factor_NN, right_OI.clone()), torch.linalg.solve(damped_II, right_OI, left=False)
    )
    inverse_II = inverted(factor.factor_NN)
    torch.testing.assert_close(inverse_II, torch.linalg.inv(damped_II))
    assert torch.equal(inverse_II, inverse_II.T)


def test_a_failed_attempt_asks_for_another_matrix() -> None:
    """What was overwritten is not what the next, larger ridge is added to."""
    indefinite_NN = torch.diag(torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64))
    asked = []

    def fresh() -> Tensor:
        asked.append(1)
        return indefinite_NN.clone()

    factor = damped_cholesky(fresh, 1e-2, "test")
    # 0.01, 0.1 and 1 of the mean diagonal 0.5 are below the 0.5 that is missing, 10 is not.
    assert (factor.num_raises, len(asked), factor.delta) == (3, 4, pytest.approx(5.0))
    torch.testing.assert_close(factor.factor_NN @ factor.factor_NN.T, indefinite_NN + 5 * torch.eye(3).double())
    with pytest.raises(NumericalError, match="stays indefinite"):
        damped_cholesky(torch.full((3, 3), torch.nan), 1e-2, "test")


def test_nothing_of_the_matrix_is_copied() -> None:
    order = 1024
    matrix_NN = torch.eye(order, dtype=torch.float64) + 1.0
    right_MN = torch.ones(64, order, dtype=torch.float64)
    with PeakMeter() as meter:
        factor_NN, definite = factored(matrix_NN)
        assert solved(factor_NN, right_MN) is right_MN
        inverse_NN = inverted(factor_NN)
        front_KK = compacted(inverse_NN, torch.arange(900), torch.arange(900))
    assert definite
    assert {matrix_NN.data_ptr()} == {t.data_ptr() for t in (factor_NN, inverse_NN, front_KK)}
    # The matrix has 8 MiB; the rest is the libraries' workspace.
    assert meter.peak_bytes < 6 * _MIB


@pytest.mark.parametrize("rows_C", [None, ROWS])
@pytest.mark.parametrize("transposed", [False, True])
def test_compacted(rows_C: Tensor | None, transposed: bool) -> None:
    matrix_II = problem()[1].double()
    matrix_II = (matrix_II + torch.arange(900.0).reshape(30, 30)).T if transposed else matrix_II
    expected = (matrix_II if rows_C is None else matrix_II[rows_C])[:, COLUMNS].clone()
    assert torch.equal(compacted(matrix_II, rows_C, COLUMNS), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_energy_of_any_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = gram_products.energy(x)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(
        float(x.double().square().sum()), rel=1e-14 if dtype == torch.float64 else 1e-6
    )
