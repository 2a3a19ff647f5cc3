"""The importance by reconstruction: what a unit's removal adds to the error of the map that reads it, solved again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structprune
from structprune import ModuleRecipe, prune_module
from structprune.errors import InputError
from structprune.modules.importance import IMPORTANCES, Gradients, unit_scores
from structprune.modules.layout import as_example
from structprune.modules.reconstruction import removal_costs
from support.networks import small_vit

DAMPING = 1e-3


def error(weight_OI: Tensor, gram_II: Tensor, removed: list[int]) -> float:
    """Half of the least squared error, with the ridge toward the weight, without some inputs."""
    damped_II = gram_II + DAMPING * gram_II.diagonal().mean() * torch.eye(len(gram_II), dtype=torch.float64)
    kept = [place for place in range(len(gram_II)) if place not in removed]
    change_OI = torch.zeros_like(weight_OI)
    change_OI[:, removed] = -weight_OI[:, removed]
    pull_OK = -change_OI[:, removed] @ damped_II[removed][:, kept]
    change_OI[:, kept] = torch.linalg.solve(damped_II[kept][:, kept], pull_OK.T).T
    return 0.5 * float((change_OI @ damped_II * change_OI).sum())


def greedy(weight_OI: Tensor, gram_II: Tensor, groups: list[list[int]]) -> tuple[list[int], list[float]]:
    """Remove the unit that costs least, all others solved again, until one is left: order, errors behind each."""
    order, errors, left = list[int](), list[float](), dict(enumerate(groups))
    while len(left) > 1:
        gone = [column for unit in order for column in groups[unit]]
        after = {unit: error(weight_OI, gram_II, sorted(gone + columns)) for unit, columns in left.items()}
        order.append(min(after, key=lambda each: after[each]))
        errors.append(after[order[-1]])
        del left[order[-1]]
    return [*order, *left], errors


def test_costs_of_neurons_are_those_of_brute_force() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)).double().requires_grad_(False)
    given = [torch.randn(10, 5, dtype=torch.float64) for _ in range(5)]
    layout = structprune.layout(model, given[0])
    found = removal_costs(layout, layout.families, [as_example(each) for each in given])["0"]
    rows_TI = torch.cat([torch.cat([model[1](model[0](each)), torch.ones(10, 1)], 1) for each in given])
    whole_OI = torch.cat([model[2].weight, model[2].bias[:, None]], 1)
    order, errors = greedy(whole_OI, rows_TI.T @ rows_TI, [[unit] for unit in range(8)])
    assert found.argsort().tolist() == order
    # A removal that adds less than the one before counts as much as that, so that the order stays.
    added = torch.tensor([0.0, *errors], dtype=torch.float64).diff().cummax(0).values
    torch.testing.assert_close(found[order[:-1]], added, rtol=1e-5, atol=0)


def test_heads_are_groups_of_their_channels() -> None:
    """The first head that leaves is the one whose channels together cost least."""
    model = small_vit().double().requires_grad_(False)
    given = [{"pixel_values": torch.randn(3, 3, 16, 16, dtype=torch.float64)} for _ in range(3)]
    layout = structprune.layout(model, given[0])
    found = removal_costs(layout, layout.families, [as_example(each) for each in given])
    family, part = next(
        (each, part)
        for each in layout.families
        for part in each.slices
        if part.tensor.endswith("o_proj.weight") and part.axis == 1
    )
    attention: Any = model.get_submodule(part.tensor.rpartition(".")[0])
    seen: list[Tensor] = []
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for each in given:
        model(**each)
    rows_TI = torch.cat(seen)
    rows_TI = torch.cat([rows_TI, torch.ones(len(rows_TI), 1)], 1)
    whole_OI = torch.cat([attention.weight, attention.bias[:, None]], 1)
    groups = [part.indices(torch.tensor([unit])).flatten().tolist() for unit in range(family.num_units)]
    order, _ = greedy(whole_OI, rows_TI.T @ rows_TI, groups)
    assert found[family.name].argsort().tolist() == order


def test_units_that_others_can_make_up_for_leave_first() -> None:
    """Two equal neurons with large weights: the norm keeps both, reconstruction needs one."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).requires_grad_(False)
    for tensor in (model[0].weight, model[0].bias):
        tensor[1] = tensor[0] = 3 * tensor[0]
    model[2].weight[:, :2] *= 3
    given = [torch.randn(50, 6) for _ in range(8)]
    kept: dict[str, int] = {}
    for importance in ("magnitude", "reconstruction"):
        result = prune_module(model, given, ModuleRecipe(sparsity=0.08, importance=importance))
        difference = sum(float((result.module(each) - model(each)).square().sum()) for each in given)
        kept[importance] = result.widths["0"][1]
        assert (difference < 1e-4) == (importance == "reconstruction")
    assert kept["magnitude"] == kept["reconstruction"] == 11


def test_examples_are_needed() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    layout = structprune.layout(model, torch.randn(4, 5))
    with pytest.raises(InputError, match="reads examples"):
        unit_scores(layout, IMPORTANCES.get("reconstruction"), dict.fromkeys(layout.parameters, Gradients()))
