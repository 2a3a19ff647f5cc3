"""Channels in another order before N:M: folded into the weights, logits as they were, and smaller errors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from structprune import Recipe, prune
from structprune.architectures.stock.model import StockModel, block_arguments
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.layerwise.assigned import assigned
from structprune.engine.layerwise.orders import dealt, in_order, input_order, movable_groups
from structprune.errors import UnsupportedError
from structprune.patterns import NM
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "method": "sparsegpt",
        "pattern": "2:4",
        "calibration": str(text_file),
        "dtype": "float32",
        "num_samples": 12,
        "seq_len": 32,
        "device": "cpu",
        "held_out": 0,
        "reload_check": False,
    }
    return Recipe.build(**{**settings, **changes})


def test_channels_are_dealt_out_one_of_each_part_to_every_group() -> None:
    order_U = dealt(torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), 4)
    # Ranked 0 to 7 in parts of two: every second part goes backwards.
    assert order_U.tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    assert dealt(torch.arange(10.0), 4).sort().values.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", {"attention", "mlp"}),
        ("qwen3_moe", {"attention", "mlp"}),
        # Families whose values have no units of their own.
        ("opt", {"mlp"}),
        ("gpt2", {"mlp"}),
        ("phi3", {"mlp"}),
    ],
)
def test_the_block_computes_what_it_did(family: str, kinds: set[str], tmp_path: Path) -> None:
    model = StockModel(CheckpointReader(save_tiny(family, tmp_path / family)))
    block = model.layout.blocks[0]
    tensors = dict(model.reader.read(block.shapes, block.prefix))
    hidden_BSD = torch.randn(2, 7, model.layout.hidden_size, generator=torch.Generator().manual_seed(0))
    groups = movable_groups(model, block, ("attention", "mlp"))
    assert {group.kind for group in groups.values()} == kinds

    def output() -> torch.Tensor:
        cast = {name: tensor.float() for name, tensor in tensors.items()}
        arguments = block_arguments(model, 7, torch.float32, torch.device("cpu"))[0]
        with torch.no_grad():
            found = model.block(0, cast)(hidden_BSD, **arguments)
        return found[0] if isinstance(found, tuple) else found

    before = output()
    for group in groups.values():
        generator = torch.Generator().manual_seed(1)
        length = group.num_units // group.partitions
        runs = [torch.randperm(length, generator=generator) + run * length for run in range(group.partitions)]
        changed = in_order(tensors, group, torch.cat(runs))
        assert any(not torch.equal(tensor, tensors[name]) for name, tensor in changed.items())
        tensors |= changed
        consumer = tensors[group.consumer.tensor]
        order_I = input_order(group, consumer.shape[group.consumer.axis], torch.cat(runs))
        assert torch.equal(order_I.sort().values, torch.arange(len(order_I)))
    assert torch.allclose(output(), before, atol=1e-5)


def test_groups_lose_less(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    reports = {
        permuted: prune(tiny_llama, recipe(text_file, permute_channels=permuted), tmp_path / str(permuted))
        for permuted in (False, True)
    }

    def error(permuted: bool) -> float:
        parts = [part for part in reports[permuted].blocks if part.kind in ("mlp.down_proj", "self_attn.o_proj")]
        return sum(part.error or 0.0 for part in parts)

    assert error(True) < error(False)
    weights = load_file(tmp_path / "True" / "model.safetensors")
    maps = [tensor for name, tensor in weights.items() if ".layers." in name and name.endswith("proj.weight")]
    assert all(NM(keep=2, of=4).matches(tensor) for tensor in maps)
    assert reports[True].memory.measured_peak_bytes <= reports[True].memory.planned_peak_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "alps", "target": "dense-path"},
        {"method": "magnitude"},
        {"method": "wanda", "pattern": "4:8", "solver": "refit"},
    ],
    ids=lambda changes: changes["method"],
)
def test_whatever_is_summed(changes: dict[str, Any], tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The stock model of the output loses what the report says: the order is the same everywhere."""
    report = prune(
        tiny_llama,
        recipe(text_file, permute_channels=True, reload_check=True, **changes),
        tmp_path / "out",
    )
    assert report.reload.mode == "whole"


def test_an_order_matters_to_groups_only(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="the order of channels matters to groups only"):
        prune(
            tiny_llama, recipe(text_file, pattern="unstructured", sparsity=0.5, permute_channels=True), tmp_path / "o"
        )


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (3, 8), (1, 4)])
def test_channels_change_groups_while_more_is_kept(keep: int, of: int) -> None:
    """No group keeps less of the whole than before, and no exchange of two channels of a place is left that pays."""
    score_UR = torch.rand(22 * of + 1, 6, generator=torch.Generator().manual_seed(0)) ** 4

    def kept(order_U: torch.Tensor) -> float:
        groups_GMR = score_UR[order_U[: 22 * of]].view(22, of, 6)
        return float(groups_GMR.topk(keep, dim=1).values.sum())

    start_U = dealt(score_UR.sum(dim=1), of)
    found_U = assigned(score_UR, start_U, keep, of)
    assert found_U.sort().values.tolist() == list(range(22 * of + 1))
    assert kept(found_U) > kept(start_U)
    for one, other in itertools.combinations(range(of - 1, 22 * of, of), 2):
        swapped_U = found_U.clone()
        swapped_U[[one, other]] = found_U[[other, one]]
        assert kept(swapped_U) <= kept(found_U) + 1e-4
