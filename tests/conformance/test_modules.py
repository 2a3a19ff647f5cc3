"""Any torch module: what can leave, smaller modules that equal the masked ones, choices, repair, files that load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structprune
from structprune import ModuleRecipe, compact, prune_module
from structprune.errors import InputError, UnsupportedError
from structprune.modules.choice import RANKINGS, Limits, choose
from structprune.modules.compaction import compacted
from structprune.modules.compare import tensors_of
from structprune.modules.costs import MACS, PARAMETERS
from structprune.modules.importance import IMPORTANCES, NORMALISATIONS, REDUCTIONS, measure, unit_scores
from structprune.modules.layout import ModuleLayout, as_example
from structprune.modules.program import GraphModule
from structprune.modules.repair import repaired
from structprune.modules.solve import Sums, least_squares_by_output
from structprune.tracing.replay import masked_state
from support.networks import Attention, Mixed, ResNet, Shared, small_bert, small_vit, small_whisper

Make = Callable[[], Any]


def pictures(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16, 16)


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 99, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}


def spoken() -> dict[str, Any]:
    return {
        "input_features": torch.randn(3, 10, 40),
        "decoder_input_ids": torch.randint(0, 60, (3, 6)),
        "use_cache": False,
    }


MODELS: dict[str, tuple[Make, Make]] = {
    "resnet": (ResNet, pictures),
    "mixed": (Mixed, pictures),
    "attention": (Attention, lambda: torch.randn(3, 5, 16)),
    "shared": (Shared, lambda: torch.randint(0, 11, (3, 5))),
    "bert": (small_bert, tokens),
    "vit": (small_vit, lambda: {"pixel_values": pictures()}),
    "whisper": (small_whisper, spoken),
}


def made(name: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    make, example = MODELS[name]
    model = make().eval()
    for module in model.modules():
        # Statistics of their own, so that a wrong choice of them is seen.
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.running_mean)
            module.running_var = torch.rand_like(module.running_var) + 0.5
    return model, [example() for _ in range(4)]


def outputs(model: nn.Module, given: Any) -> list[Tensor]:
    example = as_example(given)
    with torch.no_grad():
        return tensors_of(model(*example.args, **example.kwargs))


def distance(model: nn.Module, other: nn.Module, given: list[Any]) -> float:
    """Squared difference of the first outputs, as a share of the second model's."""
    pairs = [(outputs(model, each)[0], outputs(other, each)[0]) for each in given]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def masked(found: ModuleLayout, keep: dict[str, list[int]]) -> nn.Module:
    """The model itself with zeros in place of the units: what the library's own check does not run."""
    model = copy.deepcopy(found.model)
    state = masked_state(found.traced, found.state, found.kept_atoms(keep))
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in own.items():
        tensor.data.copy_(state[name])
    return model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_smaller_module_is_the_masked_model(name: str) -> None:
    """On inputs that the library did not see, and with as many parameters as it counts."""
    model, given = made(name)
    before = copy.deepcopy(model.state_dict())
    found = structprune.layout(model, given[0])
    keep = {family.name: list(range(1, family.num_units, 2)) for family in found.families if family.is_exact}
    smaller = compact(model, keep, given[0])
    for wanted, got in zip(outputs(masked(found, keep), given[1]), outputs(smaller, given[1]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    kept = {atom: len(units) for atom, units in found.kept_atoms(keep).items()}
    assert count(smaller) == PARAMETERS.of(found)(kept) < count(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_every_family_by_itself(name: str) -> None:
    """A family that is called exact is; one that is coupled is refused, by the name of the operation."""
    model, given = made(name)
    found = structprune.layout(model, given[0])
    assert found.families
    for family in found.families:
        keep = {family.name: list(range(1, family.num_units))}
        if family.is_exact:
            assert count(compacted(found, found.state, keep).module) < count(model)
        else:
            with pytest.raises(UnsupportedError, match="norm"):
                compacted(found, found.state, keep)
            assert count(compacted(found, found.state, keep, allow_coupled=True).module) < count(model)


def test_layout_says_what_leaves_and_what_is_held() -> None:
    model, given = made("bert")
    found = structprune.layout(model, given[0])
    family = found.family("encoder.layer.0.intermediate.dense")
    assert family.num_units == 48
    assert {(part.tensor.removeprefix("encoder.layer.0."), part.axis) for part in family.slices} == {
        ("intermediate.dense.weight", 0),
        ("intermediate.dense.bias", 0),
        ("output.dense.weight", 1),
    }
    assert family.pattern == found.family("encoder.layer.1.intermediate.dense").pattern
    assert len({each.pattern for each in found.families}) == 4
    assert any("output" in reason for axis in found.frozen for reason in axis.reasons)
    with pytest.raises(InputError, match="intermediate"):
        found.family("encoder.layer.9")
    with pytest.raises(InputError, match=r"0 \.\.\. 47"):
        compact(model, {family.name: [3, 2]}, given[0])


def test_sizes_of_modules_follow_their_tensors() -> None:
    model, given = made("mixed")
    found = structprune.layout(model, given[0])
    keep = {"stem": [0, 3, 4], "grouped": list(range(8)), "up": [1, 2]}
    smaller: Any = compact(model, keep, given[0])
    assert (smaller.stem.out_channels, smaller.slope.num_parameters) == (3, 3)
    assert (smaller.depthwise.groups, smaller.depthwise.in_channels, smaller.wide.in_channels) == (3, 3, 3)
    assert (smaller.grouped.out_channels, smaller.up.in_channels, smaller.up.out_channels) == (16, 16, 2)
    assert smaller.head.in_features == 2 * 16
    groups = next(family for family in found.families if family.name == "wide/0")
    halves: Any = compact(model, {groups.name: [1]}, given[0])
    assert (halves.grouped.groups, halves.norm.num_groups, halves.norm.num_channels) == (1, 2, 8)


def test_heads_that_torch_cannot_shrink_leave_a_graph() -> None:
    """`nn.MultiheadAttention` has one number for its width and the stream's: the graph runs, and can be trained."""
    model, given = made("attention")
    smaller = compact(model, {"layer.self_attn/0": [0, 2]}, given[0])
    assert isinstance(smaller, GraphModule)
    assert smaller.state_dict().keys() == model.state_dict().keys()
    assert smaller.state_dict()["layer.self_attn.in_proj_weight"].shape == (24, 16)
    smaller(given[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


def test_tied_tensors_stay_tied() -> None:
    model, given = made("shared")
    smaller: Any = compact(model, {"embed": [0, 1, 2, 5]}, given[0])
    assert smaller.head.weight is smaller.embed.weight
    assert smaller.embed.embedding_dim == smaller.head.in_features == 4


def test_costs_are_those_of_the_module() -> None:
    model, given = made("resnet")
    found = structprune.layout(model, given[0])
    assert PARAMETERS.of(found)({}) == count(model)
    counted = 0

    def add(module: Any, _: object, result: Tensor) -> None:
        nonlocal counted
        counted += result.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    outputs(model, given[0])
    assert MACS.of(found)({}) == counted


def classified(given: list[Any]) -> Callable[[nn.Module], Iterator[Tensor]]:
    def losses(model: nn.Module) -> Iterator[Tensor]:
        for each in given:
            yield F.cross_entropy(model(each), torch.arange(len(each)) % 10)

    return losses


@pytest.mark.parametrize("importance", [name for name in IMPORTANCES if IMPORTANCES.get(name).rate is None])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_importance_is_that_of_the_units_own_weights(importance: str, reduction: str) -> None:
    """The numbers of one family, from plain sums over its rows and columns."""
    model, given = made("resnet")
    found = structprune.layout(model, given[0])
    entry = IMPORTANCES.get(importance)
    gradients = measure(found, entry, classified(given))
    assert all(parameter.grad is None for parameter in model.parameters())
    scores = unit_scores(found, entry, gradients, reduction=reduction, normalisation="none")["layers.0.conv1"]

    def elements(name: str) -> Tensor:
        weight = model.get_parameter(name).detach()
        sums = gradients[name]
        if importance == "magnitude":
            return weight**2
        if importance == "taylor":
            assert sums.first is not None
            return (weight * sums.first).abs()
        assert sums.second is not None
        return weight**2 * sums.second / 2

    members = torch.stack(
        [
            elements("layers.0.conv1.weight").sum((1, 2, 3)),
            elements("layers.0.norm1.weight"),
            elements("layers.0.conv2.weight").sum((0, 2, 3)),
        ]
    ).double()
    if reduction == "first":
        assert any(torch.allclose(scores, each) for each in members)
    else:
        torch.testing.assert_close(scores, REDUCTIONS[reduction](members))


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisations_keep_the_order(name: str) -> None:
    scores = torch.tensor([3.0, 1.0, 7.0, 2.0, 5.0], dtype=torch.float64)
    assert NORMALISATIONS[name](scores).argsort().tolist() == scores.argsort().tolist()


def test_gradients_are_those_of_the_loss() -> None:
    model, given = made("resnet")
    found = structprune.layout(model, given[0])
    gradients = measure(found, IMPORTANCES.get("taylor"), classified(given))
    for loss in classified(given)(model):
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name].first, parameter.grad)


def test_rankings_rank_what_they_say() -> None:
    """Families of unequal importance: by itself each loses as much, together the weak one loses all that it may."""
    model, given = made("resnet")
    found = structprune.layout(model, given[0])
    cost, target = PARAMETERS.of(found), 0.75 * count(model)
    scores = {
        family.name: torch.arange(family.num_units, dtype=torch.float64) + 100 * number
        for number, family in enumerate(found.families)
    }
    kept = {name: choose(found, scores, cost, target, ranking=RANKINGS.get(name), limits=Limits()) for name in RANKINGS}
    for keep in kept.values():
        assert cost({found.family(name).atom: len(units) for name, units in keep.items()}) <= target
    shares = {name: len(kept["local"][name]) / found.family(name).num_units for name in scores}
    assert max(shares.values()) - min(shares.values()) < 0.15
    first, *_, last = found.families
    assert len(kept["global"][first.name]) == 1
    assert len(kept["global"][last.name]) == last.num_units
    # The patterns of both inner convolutions are equal, those of the stream are not.
    inner = [name for name in scores if name.endswith("conv1")]
    assert len({found.family(name).pattern for name in inner}) == 1
    assert len(kept["pattern"][inner[-1]]) == found.family(inner[-1]).num_units
    assert len(kept["pattern"]["layers.2.conv2"]) < 32


def test_limits_hold() -> None:
    model, given = made("resnet")
    recipe = ModuleRecipe(sparsity=0.4, ranking="global", max_share=0.5, multiple_of=4, repair=False)
    result = prune_module(model, given, recipe)
    for before, after in result.widths.values():
        assert after >= before / 2
        assert after % 4 == 0
    with pytest.raises(InputError, match="at least"):
        prune_module(model, given, ModuleRecipe(sparsity=0.9, max_share=0.2))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("resnet", ModuleRecipe(sparsity=0.4, cost="macs")),
        ("resnet", ModuleRecipe(sparsity=0.4, steps=3, ranking="pattern")),
        ("mixed", ModuleRecipe(sparsity=0.3, allow_coupled=True, families="all")),
        ("attention", ModuleRecipe(sparsity=0.2, families="all")),
        ("bert", ModuleRecipe(sparsity=0.3, ranking="global")),
        ("vit", ModuleRecipe(sparsity=0.2, families="stock")),
        ("whisper", ModuleRecipe(sparsity=0.2)),
    ],
)
def test_repair_brings_the_outputs_back(name: str, recipe: ModuleRecipe) -> None:
    """The same units go; with the weights that read them solved again the outputs are nearer, on other inputs too."""
    model, given = made(name)
    example = MODELS[name][1]
    given = [example() for _ in range(16)]
    other = [example() for _ in range(4)]
    with_repair = prune_module(model, given, recipe)
    without = prune_module(model, given, replace(recipe, repair=False))
    assert with_repair.costs[recipe.cost][1] <= (1 - recipe.sparsity) * with_repair.costs[recipe.cost][0]
    assert with_repair.repaired
    assert not without.repaired
    assert count(with_repair.module) == with_repair.costs["parameters"][1]
    assert distance(with_repair.module, model, other) < 0.8 * distance(without.module, model, other)


def test_repair_of_a_convolution_is_least_squares() -> None:
    """One convolution behind another: no other weight gives a smaller error on these inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1, dilation=2))
    given = [pictures() for _ in range(3)]
    found = structprune.layout(model, given[0])
    keep = {"0": [0, 2, 3, 5, 6]}
    state, names = repaired(found, keep, [as_example(each) for each in given])
    assert names == ["2.weight"]
    smaller: Any = compact(model, keep, given[0])
    parameters = {"weight": state["2.weight"][:, keep["0"]], "bias": state["2.bias"]}
    smaller[2].load_state_dict(parameters)
    wanted = distance(smaller, model, given)
    assert wanted < 0.6 * distance(compact(model, keep, given[0]), model, given)
    best = copy.deepcopy(smaller)
    optimiser = torch.optim.LBFGS(best[2].parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = sum(((best(each) - model(each).detach()).square().sum() for each in given), torch.zeros(()))
        loss.backward()
        return loss

    optimiser.step(closure)
    # The ridge of 0.01 draws toward the old weight, and costs little.
    assert distance(best, model, given) <= wanted < 1.1 * distance(best, model, given)


def test_repair_that_helps_only_where_it_was_fitted_is_left_out() -> None:
    """Two inputs are equal in the fitted examples and opposite in the held-out one: nothing may be made of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    model[0].weight.data = torch.eye(2)
    same = [torch.randn(64, 1).repeat(1, 2) for _ in range(4)]
    opposite = torch.randn(64, 1) * torch.tensor([1.0, -1.0])
    found = structprune.layout(model, same[0])
    keep = {found.families[0].name: [0]}
    _, names = repaired(found, keep, [as_example(each) for each in same])
    assert names == ["1.weight"]
    state, names = repaired(found, keep, [as_example(each) for each in (*same[:3], opposite)])
    assert names == []
    assert torch.equal(state["1.weight"], model[1].weight)


def test_outputs_choose_ridges_of_their_own() -> None:
    """An output whose held-out targets are others keeps its weight, one beside it is solved."""
    torch.manual_seed(0)
    x, y = torch.randn(50, 4).double(), torch.randn(50, 4).double()
    weight, keep = torch.randn(2, 4), torch.tensor([True, True, False, True])
    true = weight.double() + torch.tensor([[0, 0, 0, 0], [0.5, -1.0, 0, 2.0]])
    true[:, 2] = 0
    fit = Sums(gram_II=x.T @ x, target_OI=torch.stack([torch.randn(50).double(), x @ true[1]]) @ x)
    held = Sums(gram_II=y.T @ y, target_OI=torch.stack([y @ true[0], y @ true[1]]) @ y)
    solution = least_squares_by_output(weight, keep, fit, held)
    torch.testing.assert_close(solution.weight_OK[0], weight[0, keep].double())
    torch.testing.assert_close(solution.weight_OK[1], true[1, keep], rtol=0.01, atol=0.01)


def test_training_between_steps() -> None:
    model, given = made("resnet")
    sizes: list[int] = []
    result = prune_module(
        model, given, ModuleRecipe(sparsity=0.4, steps=2, repair=False), tune=lambda module: sizes.append(count(module))
    )
    assert len(sizes) == 2
    assert count(model) > sizes[0] > sizes[1] == count(result.module)


def test_family_that_shrinks_to_one_unit_is_still_counted() -> None:
    """Heads that have left but one are no family in the next step; the numbers are those of the module all the same."""
    model, given = made("bert")
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.layer.0.attention"):
            parameter.data *= 0.1
    recipe = ModuleRecipe(
        sparsity=0.29,
        steps=2,
        max_share=0.75,
        ranking="global",
        normalisation="none",
        repair=False,
        families=lambda family: family.num_units == 4,
    )
    result = prune_module(model, given, recipe)
    assert result.costs["parameters"][1] == count(result.module)
    assert [after for before, after in result.widths.values() if before == 4] == [1, 1]


def test_stock_config_where_there_is_one(tmp_path: Path) -> None:
    """A ViT of fewer neurons loads with `from_pretrained`; with fewer heads its config cannot say it."""
    from transformers import ViTForImageClassification

    model, given = made("vit")
    result = prune_module(model, given, ModuleRecipe(sparsity=0.2, families="stock"))
    assert result.is_stock
    assert result.module.config.intermediate_size == result.widths["vit.layers.0.mlp.fc1"][1] < 48  # pyright: ignore
    path = result.save(tmp_path / "vit")
    loaded = ViTForImageClassification.from_pretrained(path).eval()
    torch.testing.assert_close(outputs(loaded, given[1]), outputs(result.module, given[1]))
    heads = prune_module(model, given, ModuleRecipe(sparsity=0.2, families=lambda each: each.num_units == 4))
    assert heads.is_native
    assert not heads.is_stock


@pytest.mark.parametrize("name", ["mixed", "attention", "bert"])
def test_program_runs_without_the_models_code(name: str, tmp_path: Path) -> None:
    model, given = made(name)
    result = prune_module(model, given, ModuleRecipe(sparsity=0.2, families="all", ranking="global"))
    path = result.save(tmp_path / "out")
    assert {each.name for each in path.iterdir()} >= {"model.safetensors", "program.pt2", "module_report.json"}
    program = torch.export.load(path / "program.pt2").module()
    torch.testing.assert_close(outputs(program, given[1]), outputs(result.module, given[1]))
    with pytest.raises(InputError, match="there already"):
        result.save(path)


def test_what_cannot_be() -> None:
    model, given = made("resnet")
    with pytest.raises(InputError, match="loss"):
        prune_module(model, given, ModuleRecipe(sparsity=0.3, importance="taylor"))
    with pytest.raises(InputError, match="no batch"):
        prune_module(model, given, ModuleRecipe(sparsity=0.3, importance="taylor"), loss=lambda _: iter(()))
    with pytest.raises(InputError, match="one size"):
        prune_module(model, [*given, pictures(2)], ModuleRecipe(sparsity=0.3))
    with pytest.raises(InputError, match="no example"):
        prune_module(model, [], ModuleRecipe(sparsity=0.3))
    with pytest.raises(InputError, match="sparsity"):
        ModuleRecipe(sparsity=1.5)
    for field in ("importance", "ranking", "reduction", "normalisation", "families", "cost"):
        with pytest.raises(InputError, match="nonsense"):
            ModuleRecipe(sparsity=0.3, **{field: "nonsense"})
    with pytest.raises(UnsupportedError, match="held by"):
        prune_module(nn.Linear(4, 4), [torch.randn(3, 4)], ModuleRecipe(sparsity=0.3))


def test_mode_of_the_model_is_kept() -> None:
    model, given = made("resnet")
    model.train()
    result = prune_module(model, given, ModuleRecipe(sparsity=0.2, repair=False))
    assert model.training
    assert result.module.training
    assert not any(torch.equal(a, b) for a, b in [(outputs(model.eval(), given[0])[0], torch.zeros(1))])


def test_the_worked_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/any-architecture.md runs, and what the page says of it is so."""
    page = (Path(__file__).parents[2] / "docs" / "any-architecture.md").read_text(encoding="utf-8")
    code = page.split("```python\n", 1)[1].split("```", 1)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert [(family.num_units, family.is_exact) for family in names["found"].families] == [(16, True), (32, True)]
    text = repr(names["result"].module)
    for part in ("Conv2d(3, 12, ", "BatchNorm2d(12, ", "Conv2d(12, 24, ", "Linear(in_features=24, out_features=10"):
        assert part in text
    assert names["result"].removal.difference < 1e-6
    assert {path.name for path in (tmp_path / "out/smaller").iterdir()} == {
        "model.safetensors",
        "module_report.json",
        "program.pt2",
    }
