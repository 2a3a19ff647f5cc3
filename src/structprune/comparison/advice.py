"""Which method, scope and share to take for a model that is to lose so much: tried on few windows, side by side.

Every candidate removes as many parameters, so their losses can be compared; one whose scope is too small for that, or
that the model does not allow, is left out with the reason.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.assess.split import decided_for_a_check
from structprune.comparison.cells import (
    Variant,
    cell_recipe,
    common_recipe,
    fitted,
    parse_variant,
    scope_parameters,
    shared_settings,
)
from structprune.comparison.run import ComparisonRequest, compare
from structprune.engine.pipelines.registry import PIPELINES
from structprune.engine.resolve import check_planned
from structprune.errors import InputError, StructPruneError
from structprune.kinds import Scope
from structprune.methods import METHODS
from structprune.observer import Observer
from structprune.recipe import Recipe, flag_name
from structprune.results.comparison import Cell, Comparison
from structprune.results.frozen import Frozen
from structprune.types import ModelLayout

CANDIDATES = ("fasp", "structprune", "structprune:scope=all", "llm-pruner", "flap", "depth")
"""One of each kind: solved again, global, with heads, by gradients, with biases, whole blocks."""

# Beyond it some block would be left with next to nothing.
_LARGEST_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceRequest:
    """What is to be removed, and on what the candidates are tried."""

    model: str
    remove: float
    """Share of all parameters of the model."""
    texts: Sequence[Path]
    """What to test on: text of the kind that the model is for, not the calibration's own."""
    shared: Mapping[str, Any]
    """Recipe fields of all candidates."""
    candidates: Sequence[str] = CANDIDATES
    seq_len: int = 512
    max_windows: int | None = 8
    time_it: bool = True
    quiet: bool = False


class Tried(Frozen):
    """A candidate and what it cost."""

    label: str
    scope: str
    """Sublayers that lose units; `blocks` where whole ones or the stream's width go instead."""
    sparsity: float
    """Share of the scope's parameters, as `prune --sparsity` takes it."""
    stock: bool
    """Whether the result loads with a stock config, without code beside the weights."""
    mean_loss: float
    """Mean over the texts of the logarithm of the perplexity over the dense model's."""
    worst_loss: float
    worst_text: str
    cell: Cell
    command: str
    """The same method on the whole model, with the windows that its time allows."""


class Advice(Frozen):
    """The candidates, best first, and those that could not be tried."""

    model: str
    remove: float
    tried: list[Tried]
    left_out: dict[str, str]
    """Candidate -> the reason."""

    @property
    def best_stock(self) -> Tried | None:
        """The best of those that a stock config can say."""
        return next((found for found in self.tried if found.stock), None)


def advise(request: AdviceRequest, output: Path, observer: Observer) -> Advice:
    """Try the candidates in `output`, which is a comparison's directory, and rank them by their mean loss.

    A run that was cut goes on. Raises InputError if no candidate can be tried, and the errors of `compare`.
    """
    if not 0 < request.remove < 1:
        raise InputError("--remove is a share of the model's parameters", got=request.remove, wanted="such as 0.2")
    common = common_recipe(request.shared)
    layout = StockModel(open_model(request.model, adapter=common.merge_adapter)).layout
    cells: dict[str, tuple[Variant, float]] = {}
    stock: dict[str, bool] = {}
    left_out: dict[str, str] = {}
    variants = [parse_variant(candidate) for candidate in request.candidates]
    shared_settings(request.shared, variants)
    for variant in variants:
        try:
            share = share_of_scope(layout, cell_recipe(request.shared, variant, 0.0).scope, request.remove)
            recipe = fitted(cell_recipe(request.shared, variant, share), METHODS.get(variant.method), layout)
            resolved = check_planned(request.model, decided_for_a_check(request.model, recipe))
        except StructPruneError as error:
            left_out[variant.label] = str(error)
            observer.note(f"{variant.label} is left out: {error}")
            continue
        cells[variant.label] = variant, share
        stock[variant.label] = not resolved.forecast.shape.needs_code
    if not cells:
        raise InputError("no candidate can remove so much", got=f"--remove {request.remove:g}", do="ask for less")
    found = compare(
        ComparisonRequest(
            model=request.model,
            shared=request.shared,
            cells=list(cells.values()),
            texts=request.texts,
            seq_len=request.seq_len,
            max_windows=request.max_windows,
            time_it=request.time_it,
            plots=False,
            quiet=request.quiet,
        ),
        output,
        observer,
    )
    left_out |= {failure.label: failure.error for failure in found.failures}
    wanted = {variant.label: share for variant, share in cells.values()}
    tried = [
        _tried(found, cell, request, cells[cell.label][0], stock=stock[cell.label])
        for cell in found.cells
        if wanted.get(cell.label) == cell.sparsity
    ]
    return Advice(
        model=request.model,
        remove=request.remove,
        tried=sorted(tried, key=lambda entry: entry.mean_loss),
        left_out=left_out,
    )


def share_of_scope(layout: ModelLayout, scope: Scope, share: float) -> float:
    """Convert a share of all parameters of the model into one of the scope's. Raises InputError for too large a one."""
    in_scope = scope_parameters(layout, scope)
    found = share * layout.num_parameters / in_scope if in_scope else 1.0
    if found > _LARGEST_SHARE:
        raise InputError(
            f"{share:.1%} of the model is too much of {'the blocks' if scope == 'all' else scope}",
            got=f"{found:.1%} of it",
            wanted=f"at most {_LARGEST_SHARE:.0%}",
        )
    return round(found, 4)


def _tried(found: Comparison, cell: Cell, request: AdviceRequest, variant: Variant, *, stock: bool) -> Tried:
    excess = found.excess(cell)
    worst = max(excess, key=lambda text: excess[text])
    return Tried(
        label=cell.label,
        scope=cell.scope if PIPELINES.get(METHODS.get(cell.method).pipeline).scoped else "blocks",
        sparsity=cell.sparsity,
        stock=stock,
        mean_loss=sum(excess.values()) / len(excess),
        worst_loss=excess[worst],
        worst_text=worst,
        cell=cell,
        command=_command(request, variant, cell),
    )


def _command(request: AdviceRequest, variant: Variant, cell: Cell) -> str:
    """Write the run of `prune` that removes as much; the number of windows is left to its time."""
    fields = dict(request.shared) | dict(variant.changes)
    for name in ("num_samples", "seq_len", "method", "sparsity"):
        fields.pop(name, None)
    own = Recipe.kind_for({"method": variant.method}).model_fields
    if "scope" not in own:
        fields.pop("scope", None)
    sparsity = cell.sparsity if "scope" in own else cell.removed_share_of_blocks
    words = ["structprune", "prune", request.model, "-o", "OUT", "--method", variant.method]
    words += ["--sparsity", f"{sparsity:.4g}"]
    for name, value in fields.items():
        for entry in value if isinstance(value, list | tuple) else [value]:
            words += [flag_name(name), str(entry)]
    return shlex.join(words)
