"""Bases of the residual stream: the best ones of their width, the same every time; rotation is the plain product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, NumericalError
from structprune.linalg import rotation
from structprune.linalg.rotation import dropped_share, principal_basis, rotated


def stream(num_tokens: int = 200, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -3, width, dtype=torch.float64)
    return torch.randn(num_tokens, width, generator=generator, dtype=torch.float64) @ (scales[:, None] * mixing)


@pytest.mark.parametrize("num_keep", [1, 5, 12])
def test_basis_spans_the_leading_singular_directions(num_keep: int) -> None:
    x_TD = stream()
    basis_DK = principal_basis(x_TD.T @ x_TD, num_keep, 0.01, "here")
    assert basis_DK.shape == (12, num_keep)
    torch.testing.assert_close(basis_DK.T @ basis_DK, torch.eye(num_keep, dtype=torch.float64))
    expected_DK = torch.linalg.svd(x_TD, full_matrices=False).Vh[:num_keep].T
    torch.testing.assert_close(
        (basis_DK.T @ expected_DK).abs(), torch.eye(num_keep, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_damping_moves_no_direction_and_columns_have_a_sign() -> None:
    x_TD = stream()
    first, second = (principal_basis(x_TD.T @ x_TD, 6, damping, "here") for damping in (1e-6, 0.5))
    torch.testing.assert_close(first, second, atol=1e-7, rtol=0)
    assert (first.gather(0, first.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_the_gram_is_left_alone_and_zeros_have_a_basis() -> None:
    gram_DD = torch.zeros(4, 4, dtype=torch.float64)
    basis_DK = principal_basis(gram_DD, 2, 0.01, "here")
    assert gram_DD.abs().max() == 0
    torch.testing.assert_close(basis_DK.T @ basis_DK, torch.eye(2, dtype=torch.float64))
    assert dropped_share(gram_DD, basis_DK) == 0


def test_dropped_share_is_what_the_projection_loses() -> None:
    x_TD = stream()
    basis_DK = principal_basis(x_TD.T @ x_TD, 3, 0.01, "here")
    lost = (x_TD - x_TD @ basis_DK @ basis_DK.T).square().sum() / x_TD.square().sum()
    assert dropped_share(x_TD.T @ x_TD, basis_DK) == pytest.approx(float(lost), rel=1e-6)
    assert float(lost) > 1e-4


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 12 * 3, 2**20])
@pytest.mark.parametrize("axis", [0, 1])
def test_rotated_is_the_plain_product(axis: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn((7, 12) if axis == 1 else (12, 7), generator=generator)
    scale_D = torch.rand(12, generator=generator)
    basis_DK = torch.linalg.qr(torch.randn(12, 5, generator=generator, dtype=torch.float64)).Q
    scaled = scale_D.double()[:, None] * basis_DK
    expected = weight.double() @ scaled if axis == 1 else scaled.T @ weight.double()
    actual = rotated(weight, basis_DK, axis, scale_D)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected.float())


def test_rotated_vector() -> None:
    basis_DK = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    bias_D = torch.arange(6.0)
    torch.testing.assert_close(rotated(bias_D, basis_DK, 0), (basis_DK.T @ bias_D.double()).float())


def test_rows_are_read_in_order_and_checked(tmp_path: Path) -> None:
    weight = torch.randn(10, 3, generator=torch.Generator().manual_seed(3))
    damaged = weight.clone()
    damaged[9, 0] = float("nan")
    save_file({"good": weight, "bad": damaged}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    reader = CheckpointReader(tmp_path)
    chunks = list(reader.read_rows("good", 4))
    assert [start for start, _ in chunks] == [0, 4, 8]
    assert torch.equal(torch.cat([rows for _, rows in chunks]), weight)
    with pytest.raises(NumericalError, match="'bad' holds NaN"):
        list(reader.read_rows("bad", 4))
    with pytest.raises(CheckpointError, match="lacks tensor 'none'"):
        list(reader.read_rows("none", 4))
