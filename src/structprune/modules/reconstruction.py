"""How much each unit matters to the maps that read it, where these are solved again: greedy removal on examples.

Shape suffixes: O outputs, I inputs of a map, A the inputs that hang on one family's units, unit by unit, U units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, inverted
from structprune.linalg.obs import greedy_removal, group_costs
from structprune.modules.consumers import Consumer, consumers, whole_weight
from structprune.modules.layout import ModuleLayout, UnitFamily
from structprune.modules.repair import measure_sums
from structprune.tracing.replay import Example
from structprune.tracing.terms import kept_positions, leaves

_DAMPING = 1e-3
"""Ridge, as a share of the mean diagonal of the Gram: the smallest that the repair tries."""
_STEPS = 256
"""Steps of a greedy removal, at least: of more units some leave together."""
_GRAM_NUMBERS = 1 << 27
"""Numbers of Grams that are summed in one pass over the examples: 1 GiB in float64."""
_TIE = 1e-9
"""Share by which each removal counts more than the one before, where it costs no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One map's part in a family's units: H^-1 and W for the inputs that hang on them."""

    weight_OA: Tensor
    inverse_AA: Tensor
    width: int


def removal_costs(
    layout: ModuleLayout, families: Sequence[UnitFamily], examples: Sequence[Example]
) -> dict[str, Tensor]:
    """Return what each unit's removal adds to the error of the maps that read it, (U,), for families that have such.

    The error is that of a map's output over the examples, with the other inputs solved again. Where one map reads a
    family, its units leave greedily, each after the others were solved again without those before (Optimal Brain
    Surgeon in groups, `linalg/obs.py`). Where several do, costs of single removals are added, as no order is best for
    all of them.
    """
    found: dict[str, list[_Reading]] = {}
    state = {name: tensor.detach() for name, tensor in layout.state.items()}
    reading = [each for each in consumers(layout) if any(_hangs(each, family) for family in families)]
    for together in _batches(reading, state):
        sums = measure_sums(layout, together, examples, (state, state), {})
        for consumer in together:
            fit, held_out = sums.pop(consumer.weight)
            gram_II = fit.gram_II if held_out is None else fit.gram_II + held_out.gram_II
            inverse_II = inverted(damped_cholesky(gram_II, _DAMPING, "inputs of a map").factor_NN)
            for family in families:
                if _hangs(consumer, family):
                    part = _reading(consumer, family, whole_weight(consumer, state), inverse_II)
                    found.setdefault(family.name, []).append(part)
    return {name: _costs(parts) for name, parts in found.items()}


def _hangs(consumer: Consumer, family: UnitFamily) -> bool:
    return family.atom in leaves(consumer.term)


def _batches(reading: Sequence[Consumer], state: Mapping[str, Tensor]) -> Iterator[list[Consumer]]:
    """Yield maps whose Grams are held together."""
    batch, numbers = list[Consumer](), 0
    for consumer in reading:
        size = whole_weight(consumer, state).shape[1] ** 2
        if batch and numbers + size > _GRAM_NUMBERS:
            yield batch
            batch, numbers = [], 0
        batch.append(consumer)
        numbers += size
    if batch:
        yield batch


def _reading(consumer: Consumer, family: UnitFamily, whole_OI: Tensor, inverse_II: Tensor) -> _Reading:
    """Take the columns of a family's units, unit by unit; the inverse of all inputs, so that the others are solved."""
    places = whole_OI.shape[1] // consumer.term.size
    units = [
        sorted(
            set(kept_positions(consumer.term, {family.atom: [unit]}))
            - set(kept_positions(consumer.term, {family.atom: [other]}))
        )
        for unit, other in zip(range(family.num_units), [1, *range(family.num_units - 1)], strict=True)
    ]
    columns_A = (torch.tensor(units)[..., None] * places + torch.arange(places)).flatten().to(whole_OI.device)
    return _Reading(
        weight_OA=whole_OI[:, columns_A].double(),
        inverse_AA=inverse_II[columns_A][:, columns_A],
        width=len(columns_A) // family.num_units,
    )


def _costs(parts: Sequence[_Reading]) -> Tensor:
    if len(parts) > 1:
        return torch.stack([group_costs(each.weight_OA, each.inverse_AA, each.width) for each in parts]).sum(0).cpu()
    (part,) = parts
    size = part.weight_OA.shape[1] // part.width
    path = greedy_removal(
        part.weight_OA, part.inverse_AA, size - 1, width=part.width, units_per_step=-(-size // _STEPS)
    )
    cost = path.cost.cummax(0).values.cpu()
    costs_U = torch.full((size,), torch.inf, dtype=torch.float64)
    costs_U[path.order.cpu()] = cost * (1 + _TIE * torch.arange(size - 1, dtype=torch.float64))
    costs_U[costs_U.isinf()] = 2 * cost[-1] if len(cost) else 0.0
    return costs_U
