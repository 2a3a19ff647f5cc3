"""What a run that removes units is to do: which groups are in scope, and what the recipe leaves to the method."""

from __future__ import annotations

from structprune.allocation import ALLOCATORS
from structprune.architectures.families.common import VALUES_ENTRY
from structprune.architectures.modeling.removed import check_attention_can_go
from structprune.architectures.modeling.value_channels import has_narrow_values
from structprune.architectures.stock.model import StockModel
from structprune.architectures.units import check_bias
from structprune.errors import InputError, UnsupportedError
from structprune.kinds import Structure
from structprune.methods.method import Method
from structprune.recipe import Recipe
from structprune.scores import SCORES, SELECTORS, score_or_selector
from structprune.solvers import SOLVERS
from structprune.solvers.mlp.updates import ACTIVATIONS
from structprune.types import UNIT_KINDS, UnitGroup

_NARROW = 4096


def unit_settings(recipe: Recipe, method: Method, stock: StockModel) -> tuple[Recipe, tuple[UnitGroup, ...]]:
    """The recipe with every entry filled, and the groups in scope.

    Raises UnsupportedError for combinations without a meaning, InputError for numbers that cannot be kept.
    """
    groups = _groups_in_scope(method, recipe, stock)
    if (recipe.solver or method.solver) == "bias":
        for group in groups:
            check_bias(group)
            if group.output_normed:
                raise UnsupportedError(
                    f"solver 'bias' adds one constant, and {stock.family.name} norms what a sublayer adds per token",
                    wanted="--solver least-squares or mask-only",
                )
    if recipe.allow_block_removal and any(group.kind == "attention" for group in groups):
        check_attention_can_go(stock.config)
    recipe = recipe.model_copy(update={"multiple_of": recipe.multiple_of or _default_multiple(groups)})
    for group in groups:
        assert recipe.multiple_of is not None
        if recipe.multiple_of % group.multiple_of:
            raise UnsupportedError(
                f"stock kernels for {stock.family.name} take other widths only",
                got=f"--multiple-of {recipe.multiple_of}",
                wanted=f"a multiple of {group.multiple_of}",
            )
    recipe = _resolved(recipe, method, stock, groups)
    for group in groups:
        if recipe.solver is not None and SOLVERS.get(recipe.solver).propose is not None and group.kind == "mlp":
            _check_iterative(recipe, group, stock.family.name)
    return recipe, groups


def _check_iterative(recipe: Recipe, group: UnitGroup, family_name: str) -> None:
    """Raise UnsupportedError where a solver that moves the producers of an MLP cannot."""
    if group.up_module is None or group.activation is None:
        raise UnsupportedError(
            f"solver {recipe.solver!r} moves up and gate as maps of their own, which {family_name} does not have",
            wanted="--solver least-squares",
        )
    if group.activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"solver {recipe.solver!r} does not know this activation",
            got=group.activation,
            wanted=", ".join(ACTIVATIONS),
            do="use --solver least-squares",
        )
    if group.output_normed:
        raise UnsupportedError(
            f"solver {recipe.solver!r} fits all tokens at one scale, and {family_name} norms what the MLP adds",
            wanted="--solver least-squares",
        )


def _resolved(recipe: Recipe, method: Method, stock: StockModel, groups: tuple[UnitGroup, ...]) -> Recipe:
    """Fill what the recipe leaves to the method. Raises UnsupportedError for combinations without a meaning.

    `groups` are those in scope.
    """
    mixture = any(group.expert is not None for group in groups)
    attention = any(group.kind == "attention" for group in groups)
    narrows = attention and stock.head_units == "value-channel"
    allocator = ALLOCATORS.check(
        recipe.allocator or ("uniform" if recipe.structure == Structure.UNIFORM else method.allocator)
    )
    sensitivity = method.sensitivity_for(allocator)
    temperature = recipe.temperature
    if temperature is None:
        temperature = method.temperature if allocator == method.allocator else 0.0
    # Nothing removed leaves nothing to correct: the dense path is the model's own.
    target = (recipe.target or ("local" if mixture else method.target)) if recipe.sparsity > 0 else "local"
    if mixture and target == "dense-path":
        raise UnsupportedError(
            "experts share what they add to the stream, so none has a target of its own on the dense path",
            got="--target dense-path",
            wanted="--target local",
        )
    protect_first, protect_last = _protected_blocks(recipe, method, len(stock.layout.blocks))
    num_protected = protect_first + protect_last
    if num_protected and num_protected >= len(stock.layout.blocks):
        raise InputError(
            "every block is protected",
            got=f"--protect-first {protect_first}, --protect-last {protect_last}",
            wanted=f"fewer than {len(stock.layout.blocks)} together",
        )
    score = _check_score(recipe.score or method.score, method)
    if narrows:
        _check_value_channels(recipe, score)
    solver = SOLVERS.check(recipe.solver or method.solver)
    if solver == "bias" and recipe.sparsity == 0:
        # Nothing is missing, so nothing is added.
        solver = "mask-only"
    damping = recipe.damping or method.damping
    if solver != "mask-only" and not method.needs_statistics:
        raise UnsupportedError(
            f"method {method.name!r} measures nothing that a solver could use", wanted="--solver mask-only"
        )
    if SOLVERS.get(solver).propose is not None and damping != "auto":
        raise UnsupportedError(
            f"solver {solver!r} is judged on held-out windows",
            got=f"--damping {damping:g}",
            wanted="--damping auto",
        )
    if recipe.shrinkage and score not in SELECTORS and sensitivity != "loss":
        raise UnsupportedError(
            f"score {score!r} does not remove units one after the other, so it counts on no correlations",
            got=f"--shrinkage {recipe.shrinkage:g}",
            wanted="--score greedy, or --method structprune",
        )
    if damping == "auto" and recipe.num_samples < 2 and method.needs_statistics:
        raise InputError(
            "one window cannot both fit and choose the ridge",
            got=f"--num-samples {recipe.num_samples}, --damping auto",
            wanted="at least 2 windows, or a number for --damping",
        )
    if recipe.max_retention < recipe.min_retention:
        raise InputError(
            "no share of a block's units is within the bounds",
            got=f"--min-retention {recipe.min_retention:g}, --max-retention {recipe.max_retention:g}",
            wanted="the first at most the second",
        )
    if num_protected and recipe.structure == Structure.UNIFORM:
        raise UnsupportedError("protected blocks keep another width than the others", wanted="--structure per-layer")
    uneven = num_protected > 0 or any(block.groups != stock.groups for block in stock.layout.blocks)
    if sensitivity == "scores" and score in SELECTORS:
        raise UnsupportedError(
            f"{score!r} gives no number per unit that blocks could be compared by",
            got=f"--allocator {allocator}",
            wanted=f"another allocator, or --score {', '.join(SCORES)}",
        )
    if uneven and recipe.structure == Structure.UNIFORM:
        raise UnsupportedError("the source's blocks have different widths", wanted="--structure per-layer")
    if allocator != "uniform" and recipe.structure == Structure.UNIFORM:
        raise UnsupportedError(
            f"allocator {allocator!r} gives every block its own width",
            wanted="--structure per-layer or --allocator uniform",
        )
    if target == "dense-path" and solver == "bias":
        raise UnsupportedError("solver 'bias' makes up for removed inputs only", wanted="--target local")
    if target == "dense-path" and not method.needs_statistics:
        raise UnsupportedError(f"method {method.name!r} solves nothing, so it has no target", wanted="--target local")
    if recipe.outer_iterations and allocator == "uniform":
        raise UnsupportedError(
            "the uniform allocator reads no removal costs, so an outer iteration changes nothing",
            got=f"--outer-iterations {recipe.outer_iterations}",
            wanted="an allocator that weighs blocks, such as closed-form",
        )
    if recipe.outer_iterations and sensitivity != "loss":
        raise UnsupportedError(
            f"outer iterations measure costs by greedy removal, in another unit than {method.name!r} does",
            got=f"--outer-iterations {recipe.outer_iterations}",
            wanted="--outer-iterations 0, or --method structprune",
        )
    if recipe.allow_block_removal and allocator == "uniform":
        raise UnsupportedError(
            "the uniform allocator takes the same share of every block, so it removes none",
            got="--allow-block-removal",
            wanted="an allocator that weighs blocks, such as closed-form",
        )
    return recipe.model_copy(
        update={
            "head_units": stock.head_units,
            "allocator": allocator,
            "temperature": temperature,
            "target": target,
            "structure": recipe.structure
            or (Structure.UNIFORM if allocator == "uniform" and not (uneven or narrows) else Structure.PER_LAYER),
            "damping": damping,
            "shrinkage": recipe.shrinkage if recipe.shrinkage is not None else method.shrinkage,
            "score": score,
            "solver": solver,
            "protect_first": protect_first,
            "protect_last": protect_last,
        }
    )


def _check_value_channels(recipe: Recipe, score: str) -> None:
    """Raise UnsupportedError for what has no meaning where every KV head keeps as many value channels."""
    if recipe.structure == Structure.UNIFORM:
        raise UnsupportedError(
            "no stock config has heads with fewer value channels than key channels",
            got="--structure uniform, --head-units value-channel",
            wanted="--structure per-layer, or --head-units kv-group",
        )
    if score == "greedy-swap":
        raise UnsupportedError(
            "exchanges would move value channels from one KV head to another, and each keeps as many",
            got="--score greedy-swap, --head-units value-channel",
            wanted="--score greedy, or --head-units kv-group",
        )


def _protected_blocks(recipe: Recipe, method: Method, num_blocks: int) -> tuple[int, int]:
    """Blocks at the start and at the end that lose nothing: the recipe's numbers, else the method's.

    The method protects none where nothing is removed, or where uniform widths were asked for.
    """
    default = (0, 0)
    if recipe.sparsity > 0 and recipe.structure != Structure.UNIFORM:
        default = method.protected_blocks(num_blocks)
    given = (recipe.protect_first, recipe.protect_last)
    first, last = (value if value is not None else other for value, other in zip(given, default, strict=True))
    return first, last


def _check_score(score: str, method: Method) -> str:
    """`score` if `method` measures what it reads. Raises InputError for an unknown name, UnsupportedError else."""
    reads = score_or_selector(score).reads
    if "gradients" in reads and method.sensitivity != "taylor":
        raise UnsupportedError(
            f"score {score!r} needs gradients by the weights, which {method.name!r} does not measure",
            wanted="another --score, or --method llm-pruner",
        )
    if method.sensitivity == "taylor" and "gradients" not in reads:
        raise UnsupportedError(
            f"method {method.name!r} measures gradients by the weights, which score {score!r} does not read",
            wanted=f"--score {', '.join(name for name in SCORES if 'gradients' in SCORES.get(name).reads)}",
        )
    if score != method.score and not method.needs_statistics and method.sensitivity == "none":
        raise UnsupportedError(
            f"method {method.name!r} measures nothing that a score could read", wanted=f"--score {method.score}"
        )
    if score == "loss" and method.sensitivity != "loss":
        raise UnsupportedError(
            f"score 'loss' needs the output sensitivity, which {method.name!r} does not measure",
            wanted="another --score, or --method structprune",
        )
    return score


def _default_multiple(groups: tuple[UnitGroup, ...]) -> int:
    """32 for widths below 4096, else 128: rows that the kernels of CPUs and GPUs like."""
    return 32 if max(group.num_units * group.width for group in groups) < _NARROW else 128


def _groups_in_scope(method: Method, recipe: Recipe, stock: StockModel) -> tuple[UnitGroup, ...]:
    """In the order of the forward pass."""
    kinds = UNIT_KINDS if recipe.scope == "all" else (recipe.scope,)
    groups = {group.kind: group for group in reversed(stock.groups)}
    for kind in kinds:
        if kind == "attention" and has_narrow_values(stock.layout.config):
            raise UnsupportedError(
                "the source's heads have lost value channels, and attention is pruned of whole heads' activations",
                where=str(stock.reader.directory),
                got=f"--scope {recipe.scope}, {VALUES_ENTRY} in per_layer_config",
                wanted="--scope mlp",
                do="prune the attention of the dense model instead",
            )
        if kind not in method.kinds:
            raise UnsupportedError(
                f"method {method.name!r} does not prune {kind}",
                got=f"--scope {recipe.scope}",
                wanted=f"--scope {method.kinds[0]}",
            )
        if not groups[kind].config_fields:
            raise UnsupportedError(
                f"stock {stock.family.name} cannot express fewer {kind} units",
                got=f"--scope {recipe.scope}",
                wanted="--scope mlp",
            )
    return tuple(group for kind in kinds for group in stock.groups if group.kind == kind)
