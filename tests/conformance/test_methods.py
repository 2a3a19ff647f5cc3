"""Every method: its parts are registered, it says where it was published, and a misspelt name gets a suggestion."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from structprune.allocation import ALLOCATORS, Allocator
from structprune.architectures import FAMILIES
from structprune.calibration import SOURCES
from structprune.engine.pipelines.depth_choice import BLOCK_SCORES, BlockScore
from structprune.errors import InputError
from structprune.methods import METHODS
from structprune.methods.method import Method
from structprune.registry import Registry
from structprune.scores import SCORES, SELECTORS, Score, Selector
from structprune.scores.selection import keep_best
from structprune.solvers import SOLVERS, Solver
from structprune.solvers.elements import PRUNERS, UPDATES, Pruner, Update
from structprune.types import LayerProblem, Moments, TaylorSums, UnitKind

REGISTRIES: dict[str, Registry[Any]] = {
    "method": METHODS,
    "score": SCORES,
    "selector": SELECTORS,
    "block score": BLOCK_SCORES,
    "allocator": ALLOCATORS,
    "solver": SOLVERS,
    "pruner": PRUNERS,
    "update": UPDATES,
    "calibration source": SOURCES,
    "model family": FAMILIES,
}


UNIT_METHODS = [name for name in METHODS if METHODS.get(name).pipeline == "units"]


@pytest.mark.parametrize("name", UNIT_METHODS)
def test_parts_are_registered(name: str) -> None:
    method = METHODS.get(name)
    assert method.name == name
    homes = [r for r in (SCORES, SELECTORS) if method.score in r]
    assert len(homes) == 1
    assert isinstance(homes[0].get(method.score), Score | Selector)
    assert isinstance(ALLOCATORS.get(method.allocator), Allocator)
    assert isinstance(SOLVERS.get(method.solver), Solver)
    assert method.kinds
    assert set(method.kinds) <= set(get_args(UnitKind))


def test_depth_scores_blocks() -> None:
    method = METHODS.get("depth")
    assert method.pipeline == "depth"
    assert isinstance(BLOCK_SCORES.get(method.score), BlockScore)


def test_experts_have_a_score_of_their_own() -> None:
    method = METHODS.get("reap")
    assert method.pipeline == "experts"
    assert (method.score, method.allocator, method.solver) == ("router-weighted", "uniform", "mask-only")


def test_slicing_has_no_parts() -> None:
    method = METHODS.get("slicegpt")
    assert method.pipeline == "slice"
    assert (method.score, method.allocator, method.solver, method.sensitivity) == ("", "", "", "none")


ELEMENT_METHODS = [name for name in METHODS if METHODS.get(name).for_pattern(given=True).pipeline == "elements"]


@pytest.mark.parametrize("name", ELEMENT_METHODS)
def test_methods_over_single_weights_have_a_pruner_and_an_update(name: str) -> None:
    method = METHODS.get(name).in_pipeline("elements")
    assert method.name == name
    pruner, update = PRUNERS.get(method.score), UPDATES.get(method.solver)
    assert isinstance(pruner, Pruner)
    assert isinstance(update, Update)
    assert method.needs_statistics == bool(pruner.reads | update.reads)
    assert method.damping == "auto" or 0 < method.damping <= 1


def test_one_name_may_mean_two_methods() -> None:
    magnitude = METHODS.get("magnitude")
    assert magnitude.for_pattern(given=False) is magnitude.in_pipeline("units") is magnitude
    assert magnitude.for_pattern(given=True) is magnitude.in_pipeline("elements") is magnitude.patterned
    assert METHODS.get("fasp").for_pattern(given=True) is METHODS.get("fasp")


@pytest.mark.parametrize("name", list(METHODS))
def test_says_what_it_is_and_where_it_was_published(name: str) -> None:
    method = METHODS.get(name)
    for text in (method.title, method.paper, method.summary):
        assert text.strip()
    hints = get_type_hints(Method)
    assert method.provenance in get_args(hints["provenance"])
    assert method.target in get_args(hints["target"])
    assert method.pipeline in get_args(hints["pipeline"])
    assert method.damping == "auto" or 0 < method.damping <= 1


@pytest.mark.parametrize("name", list(METHODS))
def test_its_file_explains_it(name: str) -> None:
    """One file per method; its docstring is the method's page in the API documentation."""
    METHODS.get(name)
    files = [
        module
        for key, module in sys.modules.items()
        if key.startswith("structprune.methods.") and METHODS.get(name) in vars(module).values()
    ]
    assert len(files) == 1
    assert files[0].__doc__ is not None
    assert len(files[0].__doc__.split()) >= 10


@pytest.mark.parametrize("name", UNIT_METHODS)
def test_needs_statistics_exactly_where_a_part_reads_them(name: str) -> None:
    """Without statistics the engine hands over an identity for the Gram; the parts must then not look at it."""
    method = METHODS.get(name)
    if method.pipeline != "units":
        pytest.skip("no part of it sees a layer's problem")
    generator = torch.Generator().manual_seed(0)
    # The Gram prefers the first units, the weights the last ones.
    x_TI = torch.randn(30, 6, generator=generator) * torch.arange(6, 0, -1) ** 3
    problem = LayerProblem(
        weight_OI=torch.randn(4, 6, generator=generator).sign() * torch.arange(1, 7),
        fit=Moments(gram_II=x_TI.T @ x_TI, num_tokens=30, sum_I=x_TI.double().sum(dim=0)),
        width=1,
        damping=1e-4,
        producer_norms_MU=torch.ones(1, 6),
        taylor=TaylorSums(**dict.fromkeys(("signed_U", "first_U", "second_U", "mixed_U"), torch.arange(6.0))),
    )
    unmeasured = replace(problem.fit, gram_II=torch.eye(6), sum_I=torch.zeros(6, dtype=torch.float64))
    blind = replace(problem, fit=unmeasured)

    def pruned(given: LayerProblem) -> tuple[Tensor, Tensor]:
        if method.score in SELECTORS:
            keep_U = SELECTORS.get(method.score).keep(given, 4)
        else:
            keep_U = keep_best(SCORES.get(method.score).score(given), 4)
        return keep_U, SOLVERS.get(method.solver).solve(given, keep_U).weight_OK

    same = all(torch.equal(a, b) for a, b in zip(pruned(problem), pruned(blind), strict=True))
    assert method.needs_statistics == (not same)


@pytest.mark.parametrize("name", list(METHODS))
def test_some_block_is_never_protected(name: str) -> None:
    method = METHODS.get(name)
    for num_blocks in range(1, 129):
        first, last = method.protected_blocks(num_blocks)
        assert 0 <= first + last < num_blocks
    assert method.protected_blocks(1) == method.protected_blocks(2) == (0, 0)


def test_llm_pruner_leaves_the_outer_blocks_alone() -> None:
    """Blocks 4 to 29 of LLaMA-7B are pruned; shorter models protect fewer blocks."""
    sizes = {32: (4, 2), 30: (3, 1), 16: (2, 1), 12: (1, 0), 7: (0, 0)}
    assert {size: METHODS.get("llm-pruner").protected_blocks(size) for size in sizes} == sizes


@pytest.mark.parametrize("kind", list(REGISTRIES))
def test_every_entry_can_be_imported(kind: str) -> None:
    registry = REGISTRIES[kind]
    assert list(registry)
    for name in registry:
        assert name in registry
        assert registry.get(name) is not None


@pytest.mark.parametrize("kind", list(REGISTRIES))
def test_misspelt_name_gets_a_suggestion(kind: str) -> None:
    registry = REGISTRIES[kind]
    name = next(iter(registry))
    with pytest.raises(InputError, match=f"^unknown {kind}.* '{name}x'.*[Dd]id you mean '{name}'") as caught:
        registry.get(name + "x")
    assert all(known in str(caught.value) for known in registry)


def test_strange_name_gets_the_list_and_no_suggestion() -> None:
    assert "zzzzzzzzzz" not in METHODS
    with pytest.raises(InputError, match=f"Known: {', '.join(METHODS)}") as caught:
        METHODS.check("zzzzzzzzzz")
    assert "did you mean" not in str(caught.value).lower()


def test_registry_imports_nothing_before_it_is_asked() -> None:
    registry = Registry("thing", object, {"absent": "structprune.not_there:X", "here": "structprune.types:X"})
    assert list(registry) == ["absent", "here"]
    assert registry.check("absent") == "absent"
    with pytest.raises(ModuleNotFoundError):
        registry.get("absent")
    with pytest.raises(AttributeError):
        registry.get("here")
