"""How much each unit of a family matters: group importance over all tensors that it owns a part of.

DepGraph (arXiv 2301.12900), section 3.4: every member gives a number per unit, members are reduced to one number, and
the numbers of a family are normalised so that families can be ranked together. Suffixes: U units, M members.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from structprune.errors import InputError
from structprune.modules.layout import ModuleLayout, UnitFamily, evaluating
from structprune.modules.reconstruction import removal_costs
from structprune.registry import Registry
from structprune.tracing.replay import Example

Losses = Callable[[nn.Module], Iterable[Tensor]]
"""Gives the loss of one batch after the other, of the model as it is then; each is differentiated as it comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """What the loss says of one parameter; nothing where the score does not ask for it."""

    first: Tensor | None = None
    """Sum of the batches' gradients."""
    second: Tensor | None = None
    """Sum of their squares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """How much each element of a parameter matters; a unit's number is the sum over what it owns."""

    name: str
    score: Callable[[Tensor, Gradients], Tensor]
    reads: frozenset[str] = frozenset()
    """Fields of `Gradients` that are measured for it."""
    rate: Callable[[ModuleLayout, Sequence[UnitFamily], Sequence[Example]], dict[str, Tensor]] | None = None
    """Numbers of whole units, (U,) by family, from examples; families that are not there have those of `score`."""


def _magnitude(weight: Tensor, _: Gradients) -> Tensor:
    return weight.square()


def _taylor(weight: Tensor, gradients: Gradients) -> Tensor:
    assert gradients.first is not None
    return (weight * gradients.first).abs()


def _hessian(weight: Tensor, gradients: Gradients) -> Tensor:
    """Take the diagonal of the Hessian as the mean squared gradient: w^2 g^2 / 2 (optimal brain damage)."""
    assert gradients.second is not None
    return weight.square() * gradients.second / 2


MAGNITUDE = Importance(name="magnitude", score=_magnitude)
TAYLOR = Importance(name="taylor", score=_taylor, reads=frozenset({"first"}))
HESSIAN = Importance(name="hessian", score=_hessian, reads=frozenset({"second"}))
RECONSTRUCTION = Importance(name="reconstruction", score=_magnitude, rate=removal_costs)
IMPORTANCES: Registry[Importance] = Registry(
    "importance",
    Importance,
    {
        "magnitude": "structprune.modules.importance:MAGNITUDE",
        "taylor": "structprune.modules.importance:TAYLOR",
        "hessian": "structprune.modules.importance:HESSIAN",
        "reconstruction": "structprune.modules.importance:RECONSTRUCTION",
    },
)

REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores_MU: scores_MU.mean(0),
    "sum": lambda scores_MU: scores_MU.sum(0),
    "max": lambda scores_MU: scores_MU.amax(0),
    "first": lambda scores_MU: scores_MU[0],
}
"""Members' numbers (M, U) -> one number per unit (U)."""

NORMALISATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores_U: scores_U,
    "mean": lambda scores_U: scores_U / scores_U.mean().clamp_min(_least(scores_U)),
    "max": lambda scores_U: scores_U / scores_U.amax().clamp_min(_least(scores_U)),
    "sum": lambda scores_U: scores_U / scores_U.sum().clamp_min(_least(scores_U)),
    "gaussian": lambda scores_U: (scores_U - scores_U.mean()) / scores_U.std().clamp_min(_least(scores_U)),
    # Share of what is left once all that is smaller is gone (LAMP, arXiv 2010.07611).
    "lamp": lambda scores_U: _of_the_rest(scores_U),
}
"""How the numbers of a family are made comparable with those of others."""


def _least(scores: Tensor) -> float:
    return torch.finfo(scores.dtype).tiny


def _of_the_rest(scores_U: Tensor) -> Tensor:
    order_U = scores_U.argsort()
    ordered_U = scores_U[order_U]
    rest_U = ordered_U.flip(0).cumsum(0).flip(0)
    return torch.empty_like(scores_U).index_copy_(0, order_U, ordered_U / rest_U.clamp_min(_least(scores_U)))


def entry(table: Mapping[str, Callable[[Tensor], Tensor]], name: str, kind: str) -> Callable[[Tensor], Tensor]:
    """Return an entry of one of the tables here. Raises InputError for a name that it has not."""
    if name not in table:
        raise InputError(f"unknown {kind} {name!r}", wanted=", ".join(table))
    return table[name]


def measure(layout: ModuleLayout, importance: Importance, losses: Losses | None) -> dict[str, Gradients]:
    """Collect the gradients that an importance reads, of every parameter, over all batches of `losses`.

    Raises InputError where there is no loss to differentiate.
    """
    found = dict.fromkeys(layout.parameters, Gradients())
    if not importance.reads:
        return found
    if losses is None:
        raise InputError(
            f"the importance {importance.name!r} reads gradients",
            wanted="loss, a function that yields the loss of each batch",
            do="give loss=..., or take importance='magnitude'",
        )
    wanted = {name: tensor for name, tensor in layout.state.items() if name in layout.parameters}
    frozen = [tensor for tensor in wanted.values() if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_()
    try:
        with evaluating(layout.model), torch.enable_grad():
            for loss in losses(layout.model):
                each = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
                for name, gradient in zip(wanted, each, strict=True):
                    found[name] = _added(found[name], gradient.detach(), importance.reads)
            if not any(each.first is not None or each.second is not None for each in found.values()):
                raise InputError("the loss has no batch", wanted="one loss or more from loss(model)")
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
    return found


def _added(sums: Gradients, gradient: Tensor, reads: frozenset[str]) -> Gradients:
    if "first" in reads:
        sums = replace(sums, first=gradient if sums.first is None else sums.first + gradient)
    if "second" in reads:
        square = gradient.square()
        sums = replace(sums, second=square if sums.second is None else sums.second + square)
    return sums


def unit_scores(
    layout: ModuleLayout,
    importance: Importance,
    gradients: Mapping[str, Gradients],
    *,
    reduction: str = "mean",
    normalisation: str = "mean",
    examples: Sequence[Example] = (),
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Compute one number per unit of every family, or of those of `names`, (U,) in float64.

    Biases and buffers do not count, as they are added to what the weights give; `examples` are for an importance that
    rates units by them. Raises InputError for unknown names of a reduction or a normalisation, and where such an
    importance has none.
    """
    reduce, normalise = entry(REDUCTIONS, reduction, "reduction"), entry(NORMALISATIONS, normalisation, "normalisation")
    elements: dict[str, Tensor] = {}
    for name in _weights(layout):
        weight, sums = layout.state[name].detach(), gradients[name]
        elements[name] = importance.score(weight, sums)
    if importance.rate is not None and not examples:
        raise InputError(f"the importance {importance.name!r} reads examples", wanted="one input or more")
    families = [family for family in layout.families if names is None or family.name in names]
    rated = {} if importance.rate is None else importance.rate(layout, families, examples)
    found: dict[str, Tensor] = {}
    for family in families:
        members = _member_scores(family, elements)
        scores_U = reduce(torch.stack(members)) if members else torch.zeros(family.num_units, dtype=torch.float64)
        scores_U = rated.get(family.name, scores_U)
        found[family.name] = normalise(scores_U)
    return found


def _weights(layout: ModuleLayout) -> list[str]:
    """List the parameters that no operation reads as its bias alone."""
    return [
        name
        for name in layout.traced.parameters
        if name in layout.parameters and not all(use.is_bias for use in layout.uses.get(name, ()))
    ]


def _member_scores(family: UnitFamily, elements: Mapping[str, Tensor]) -> list[Tensor]:
    """List the numbers per unit of every tensor and axis that the family has a part of."""
    sums: dict[tuple[str, int], Tensor] = {}
    units = torch.arange(family.num_units)
    for part in family.slices:
        if part.tensor not in elements:
            continue
        score = elements[part.tensor].to(torch.float64)
        along = score.sum([axis for axis in range(score.ndim) if axis != part.axis]) if score.ndim > 1 else score
        each_U = along.cpu()[part.indices(units)].reshape(family.num_units, -1).sum(1)
        place = (part.tensor, part.axis)
        sums[place] = sums[place] + each_U if place in sums else each_U
    return list(sums.values())
