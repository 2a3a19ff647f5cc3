"""Combinations of settings of a run that removes units which have no meaning: each is refused for what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from structprune.allocation import ALLOCATORS
from structprune.architectures.units import check_bias
from structprune.errors import InputError, UnsupportedError
from structprune.kinds import Structure
from structprune.methods.method import Method, SensitivityKind
from structprune.recipe.units import Damping, Target, UnitsRecipe
from structprune.scores import SCORES, SELECTORS, score_or_selector
from structprune.solvers import SOLVERS
from structprune.solvers.mlp.updates import ACTIVATIONS
from structprune.types import UnitGroup

_IDLE_SOLVER = "mask-only"


def check_score(score: str, method: Method) -> str:
    """Return `score` if `method` measures what it reads. Raises InputError or UnsupportedError."""
    reads = score_or_selector(score).reads
    if "gradients" in reads and method.sensitivity is not SensitivityKind.TAYLOR:
        raise UnsupportedError(
            f"score {score!r} needs gradients by the weights, which {method.name!r} does not measure",
            wanted="another --score, or --method llm-pruner",
        )
    if method.sensitivity is SensitivityKind.TAYLOR and "gradients" not in reads:
        raise UnsupportedError(
            f"method {method.name!r} measures gradients by the weights, which score {score!r} does not read",
            wanted=f"--score {', '.join(name for name in SCORES if 'gradients' in SCORES.get(name).reads)}",
        )
    if score != method.score and not method.needs_statistics and method.sensitivity is SensitivityKind.NONE:
        raise UnsupportedError(
            f"method {method.name!r} measures nothing that a score could read", wanted=f"--score {method.score}"
        )
    if "sensitivity" in reads and method.sensitivity is not SensitivityKind.LOSS:
        raise UnsupportedError(
            f"score {score!r} needs the output sensitivity, which {method.name!r} does not measure",
            wanted="another --score, or --method structprune",
        )
    return score


def check_allocator(recipe: UnitsRecipe, method: Method, score: str, allocator: str) -> None:
    """Raise UnsupportedError where the allocator cannot compare blocks, compares none, or has nothing to scale."""
    sensitivity, entry = method.sensitivity_for(allocator), ALLOCATORS.get(allocator)
    weighs = "an allocator that weighs blocks, such as closed-form"
    if recipe.sensitivity_scale != "given" and sensitivity is not SensitivityKind.LOSS:
        raise UnsupportedError(
            f"method {method.name!r} with the {allocator} allocator measures no sensitivities that could be scaled",
            got=f"--sensitivity-scale {recipe.sensitivity_scale}",
            wanted="--sensitivity-scale given, or --method structprune",
        )
    if recipe.temperature and not entry.has_temperature:
        raise UnsupportedError(
            f"the {allocator} allocator has no temperature",
            got=f"--temperature {recipe.temperature:g}",
            wanted=f"--allocator {', '.join(name for name in ALLOCATORS if ALLOCATORS.get(name).has_temperature)}",
        )
    if sensitivity is SensitivityKind.SCORES and score in SELECTORS:
        raise UnsupportedError(
            f"{score!r} gives no number per unit that blocks could be compared by",
            got=f"--allocator {allocator}",
            wanted=f"another allocator, or --score {', '.join(SCORES)}",
        )
    if recipe.outer_iterations and entry.compares == "none":
        raise UnsupportedError(
            f"the {allocator} allocator reads no removal costs, so an outer iteration changes nothing",
            got=f"--outer-iterations {recipe.outer_iterations}",
            wanted=weighs,
        )
    if recipe.outer_iterations and sensitivity is not SensitivityKind.LOSS:
        raise UnsupportedError(
            f"outer iterations measure costs by greedy removal, in another unit than {method.name!r} does",
            got=f"--outer-iterations {recipe.outer_iterations}",
            wanted="--outer-iterations 0, or --method structprune",
        )
    if recipe.allow_block_removal and entry.even:
        raise UnsupportedError(
            f"the {allocator} allocator takes the same share of every block, so it removes none",
            got="--allow-block-removal",
            wanted=weighs,
        )


def check_correlations(recipe: UnitsRecipe, method: Method, score: str, allocator: str) -> None:
    """Raise UnsupportedError for a shrinkage that nothing reads."""
    if recipe.shrinkage and score not in SELECTORS and method.sensitivity_for(allocator) is not SensitivityKind.LOSS:
        raise UnsupportedError(
            f"score {score!r} does not remove units one after the other, so it counts on no correlations",
            got=f"--shrinkage {recipe.shrinkage:g}",
            wanted="--score greedy, or --method structprune",
        )


def check_solver(recipe: UnitsRecipe, method: Method, solver: str, damping: Damping) -> None:
    """Raise UnsupportedError for a solver that lacks what it reads, InputError for too few windows to judge a ridge."""
    if SOLVERS.get(solver).reads and not method.needs_statistics:
        raise UnsupportedError(
            f"method {method.name!r} measures nothing that a solver could use", wanted=f"--solver {_IDLE_SOLVER}"
        )
    if SOLVERS.get(solver).propose is not None and damping != "auto":
        raise UnsupportedError(
            f"solver {solver!r} is judged on held-out windows",
            got=f"--damping {damping:g}",
            wanted="--damping auto",
        )
    if damping == "auto" and recipe.most_samples < 2 and method.needs_statistics:
        raise InputError(
            "one window cannot both fit and choose the ridge",
            got=f"--num-samples {recipe.most_samples}, --damping auto",
            wanted="at least 2 windows, or a number for --damping",
        )


def check_path(method: Method, solver: str, target: Target) -> None:
    """Raise UnsupportedError for a target on the dense path that the solver cannot follow."""
    if target == "dense-path" and "biases" in SOLVERS.get(solver).changes:
        raise UnsupportedError(f"solver {solver!r} makes up for removed inputs only", wanted="--target local")
    if target == "dense-path" and not method.needs_statistics:
        raise UnsupportedError(f"method {method.name!r} solves nothing, so it has no target", wanted="--target local")


def check_biases(solver: str, groups: Sequence[UnitGroup], family_name: str) -> None:
    """Raise UnsupportedError where a solver that adds to biases cannot."""
    if "biases" not in SOLVERS.get(solver).changes:
        return
    for group in groups:
        check_bias(group)
        if group.output_normed:
            raise UnsupportedError(
                f"solver {solver!r} adds one constant, and {family_name} norms what a sublayer adds per token",
                wanted="--solver least-squares or mask-only",
            )


def check_iterative(solver: str, group: UnitGroup, family_name: str) -> None:
    """Raise UnsupportedError where a solver that moves the producers of an MLP cannot."""
    if group.up_module is None or group.activation is None:
        raise UnsupportedError(
            f"solver {solver!r} moves up and gate as maps of their own, which {family_name} does not have",
            wanted="--solver least-squares",
        )
    if group.activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"solver {solver!r} does not know this activation",
            got=group.activation,
            wanted=", ".join(ACTIVATIONS),
            do="use --solver least-squares",
        )
    if group.output_normed:
        raise UnsupportedError(
            f"solver {solver!r} fits all tokens at one scale, and {family_name} norms what the MLP adds",
            wanted="--solver least-squares",
        )


def check_value_channels(recipe: UnitsRecipe, score: str) -> None:
    """Raise UnsupportedError for what has no meaning where every KV head keeps as many value channels."""
    if recipe.structure == Structure.UNIFORM:
        raise UnsupportedError(
            "no stock config has heads with fewer value channels than key channels",
            got="--structure uniform, --head-units value-channel",
            wanted="--structure per-layer, or --head-units kv-group",
        )
    if score in SELECTORS and not SELECTORS.get(score).keeps_partitions:
        raise UnsupportedError(
            "exchanges would move value channels from one KV head to another, and each keeps as many",
            got=f"--score {score}, --head-units value-channel",
            wanted="--score greedy, or --head-units kv-group",
        )
