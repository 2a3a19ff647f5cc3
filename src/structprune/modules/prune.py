"""The steps of a run on any module: layout, importance, choice, repair, compaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.errors import InputError
from structprune.files import make_folder, whole_folder, write_json
from structprune.modules.choice import RANKINGS, Limits, choose
from structprune.modules.compaction import Compaction, compacted
from structprune.modules.costs import COSTS, Counts
from structprune.modules.eligible import eligible
from structprune.modules.importance import IMPORTANCES, Losses, measure, unit_scores
from structprune.modules.layout import Given, Keep, ModuleLayout, as_example, evaluating, layout
from structprune.modules.program import save_program
from structprune.modules.repair import repaired
from structprune.modules.settings import ModuleRecipe
from structprune.modules.stock import stock_model
from structprune.tracing.replay import Example, Removal

Tune = Callable[[nn.Module], object]
"""Trains the smaller module in place, between two steps and behind the last one."""
_TIMED_CALLS = 5
_TIMED_TRIALS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedModule:
    """A smaller module, and what was found on the way."""

    module: nn.Module
    """The model's own class with smaller tensors, or the graph of the example with them."""
    is_native: bool
    """Whether it is the model's own class."""
    is_stock: bool
    """Whether a stock config describes it, which is then `module.config`."""
    removal: Removal | None
    """Difference from the module with zeros in place of the units, in the last step; None where coupled units left."""
    widths: Mapping[str, tuple[int, int]]
    """Family -> its units before and after."""
    costs: Mapping[str, tuple[int, int]]
    """`parameters` and `macs` before and after."""
    repaired: tuple[str, ...]
    """Weights that were solved again in the last step."""
    example: Example

    def report(self) -> dict[str, Any]:
        """Return what was found as JSON-ready values."""
        return {
            "is_native": self.is_native,
            "is_stock": self.is_stock,
            "difference_from_masked": None if self.removal is None else self.removal.difference,
            "change_of_the_output": None if self.removal is None else self.removal.effect,
            "costs": {name: {"before": before, "after": after} for name, (before, after) in self.costs.items()},
            "widths": {name: {"before": before, "after": after} for name, (before, after) in self.widths.items()},
            "repaired": list(self.repaired),
        }

    def save(self, directory: str | Path) -> Path:
        """Write weights, program and report into a new directory, and return it.

        `model.safetensors` has the tensors under their old names, with `config.json` where a stock config says them, so
        that `from_pretrained` loads the directory; `program.pt2` runs for the example's sizes without the model's code
        (`torch.export.load`). Raises InputError for a directory that is there, UnsupportedError where no program can be
        made.
        """
        path = Path(directory)
        if path.exists():
            raise InputError("the directory is there already", where=str(path), do="name another one")
        make_folder(path.parent, "the smaller module")
        save_pretrained: Any = getattr(self.module, "save_pretrained", None)
        with whole_folder(path) as staging:
            if self.is_stock and callable(save_pretrained):
                save_pretrained(staging)
            else:
                save_model(self.module, str(staging / "model.safetensors"))
            save_program(self.module, self.example, staging / "program.pt2")
            write_json(staging / "module_report.json", self.report())
        return path


def prune_module(
    model: nn.Module,
    examples: Sequence[Given],
    recipe: ModuleRecipe,
    *,
    loss: Losses | None = None,
    tune: Tune | None = None,
) -> PrunedModule:
    """Make a smaller module of any torch module, which stays as it is.

    `examples` are inputs of equal sizes, each a tensor, arguments in order or a mapping by name: the first one is
    traced, and weights are solved again on all of them. `loss(model)` yields the losses of batches, for scores that
    read gradients. `tune(model)` trains the smaller module in place after each step. Everything is done in memory, and
    in evaluation mode except what `tune` does.

    Raises InputError for settings, examples or a budget that cannot be, and UnsupportedError where the module has no
    fixed graph, where no unit can leave, or where the smaller module is not the masked one.
    """
    if not examples:
        raise InputError("there is no example", wanted="one input or more, of equal sizes")
    inputs = [as_example(each) for each in examples]
    _check_sizes(inputs)
    dense = current = layout(model, examples[0])
    names = eligible(dense, recipe.families, allow_coupled=recipe.allow_coupled, protect=recipe.protect)
    left = {family.name: family.num_units for family in dense.families}
    done: _Step | None = None
    for number in range(1, recipe.steps + 1):
        share = recipe.sparsity * number / recipe.steps
        done = _step(dense, current, names, recipe, share, inputs, loss)
        module = done.compaction.module
        left |= {name: len(units) for name, units in done.keep.items()}
        if tune is not None:
            tune(module)
            module.eval()
        if number < recipe.steps:
            current = layout(module, examples[0])
            # A family of one unit is none any more, and others of its module have other names then.
            names &= {family.name for family in current.families if left.get(family.name) == family.num_units}
    assert done is not None
    counts = {family.atom: left[family.name] for family in dense.families}
    module, is_stock = done.compaction.module, False
    if done.compaction.is_native:
        stock = stock_model(dense, module, counts)
        module, is_stock = (stock, True) if stock is not None else (module, False)
    module.train(model.training)
    return PrunedModule(
        module=module,
        is_native=done.compaction.is_native,
        is_stock=is_stock,
        removal=done.compaction.removal,
        widths={family.name: (family.num_units, left[family.name]) for family in dense.families},
        costs={name: (COSTS.get(name).of(dense)({}), COSTS.get(name).of(dense)(counts)) for name in COSTS},
        repaired=tuple(done.repaired),
        example=inputs[0],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    compaction: Compaction
    keep: Keep
    repaired: Sequence[str]


def _check_sizes(inputs: Sequence[Example]) -> None:
    """Raise InputError where the examples have not the same form and sizes."""

    def sizes(example: Example) -> list[object]:
        leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
        return [tuple(each.shape) if isinstance(each, Tensor) else each for each in leaves]

    for number, each in enumerate(inputs):
        if sizes(each) != sizes(inputs[0]):
            raise InputError(
                "the examples are not of one size",
                where=f"example {number}",
                got=str(sizes(each))[:200],
                wanted=str(sizes(inputs[0]))[:200],
                do="cut or fill them to one size, and leave a shorter last batch out",
            )


def _step(
    dense: ModuleLayout,
    current: ModuleLayout,
    names: Collection[str],
    recipe: ModuleRecipe,
    share: float,
    inputs: Sequence[Example],
    loss: Losses | None,
) -> _Step:
    """Remove units of the current module until so much of the dense module's cost has gone."""
    importance = IMPORTANCES.get(recipe.importance)
    gradients = measure(current, importance, loss)
    scores = unit_scores(
        current,
        importance,
        gradients,
        reduction=recipe.reduction,
        normalisation=recipe.normalisation,
        examples=inputs,
        names=names,
    )
    limits = Limits(max_share=recipe.max_share, multiple_of=recipe.multiple_of)
    # Seconds are searched by multiplications.
    cost, ranking = COSTS.find(recipe.cost) or COSTS.get("macs"), RANKINGS.get(recipe.ranking)
    if ranking.weigh is not None:
        scores = ranking.weigh(current, scores, cost.of(current), inputs, recipe.max_share)

    def chosen(count: Callable[[Counts], int], target: float) -> dict[str, list[int]]:
        return choose(current, scores, count, target, ranking=ranking, limits=limits)

    if recipe.cost in COSTS:
        keep = chosen(cost.of(current), (1 - share) * cost.of(dense)({}))
    else:
        keep = _timed(dense, current, chosen, 1 - share, recipe)
    state, done = repaired(current, keep, inputs) if recipe.repair else (current.state, list[str]())
    compaction = compacted(current, state, keep, allow_coupled=recipe.allow_coupled)
    return _Step(compaction=compaction, keep=keep, repaired=done)


def _timed(
    dense: ModuleLayout,
    current: ModuleLayout,
    chosen: Callable[[Callable[[Counts], int], float], dict[str, list[int]]],
    share: float,
    recipe: ModuleRecipe,
) -> dict[str, list[int]]:
    """Search the multiplications that are left for the seconds that are wanted; each trial is built and timed."""
    macs = COSTS.get("macs").of(current)
    wanted, whole = share * seconds_of(dense.model, dense.example), macs({})
    low, high = 0.0, 1.0
    best: dict[str, list[int]] | None = None
    for _ in range(_TIMED_TRIALS):
        middle = (low + high) / 2
        try:
            keep = chosen(macs, middle * whole)
        except InputError:
            low = middle
            continue
        trial = compacted(current, current.state, keep, allow_coupled=recipe.allow_coupled).module
        if seconds_of(trial, current.example) <= wanted:
            low, best = middle, keep
        else:
            high = middle
    if best is None:
        raise InputError(
            "no number of units is so fast",
            where=type(dense.model).__name__,
            wanted=f"{wanted * 1e3:.2f} ms",
            do="ask for a lower sparsity, or count macs instead",
        )
    return best


def seconds_of(model: nn.Module, example: Example) -> float:
    """Measure one call of a module in evaluation mode, in seconds: the median of some, behind one that warms up."""
    times: list[float] = []
    with evaluating(model), torch.no_grad():
        for _ in range(_TIMED_CALLS + 1):
            start = time.perf_counter()
            model(*example.args, **example.kwargs)
            times.append(time.perf_counter() - start)
    return median(times[1:])
