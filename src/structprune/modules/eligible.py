"""Which families may lose units in a run: found by trying to remove half of the units of each sort."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from structprune.errors import InputError, UnsupportedError
from structprune.modules.compaction import compacted
from structprune.modules.layout import ModuleLayout, UnitFamily
from structprune.modules.stock import stock_model
from structprune.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Eligibility:
    """A rule of which families may lose units; families of one sort have the same pattern and the same size."""

    name: str
    holds: Callable[[ModuleLayout, Sequence[UnitFamily], bool], bool]
    """(layout, the families of one sort, whether coupled units may leave) -> whether they may lose units."""
    is_strict: bool
    """Whether there is nothing to remove where it holds for none; else all families may lose units then."""


def _runs(layout: ModuleLayout, families: Sequence[UnitFamily], allow_coupled: bool) -> bool:
    """Whether the model's own code runs without half of the units of the first one."""
    try:
        return compacted(layout, layout.state, _half(families[:1]), allow_coupled=allow_coupled).is_native
    except UnsupportedError:
        return False


def _has_config(layout: ModuleLayout, families: Sequence[UnitFamily], allow_coupled: bool) -> bool:
    """Whether a stock config describes the model without half of the units of each one."""
    keep = _half(families)
    try:
        module = compacted(layout, layout.state, keep, allow_coupled=allow_coupled).module
    except UnsupportedError:
        return False
    counts = {atom: len(units) for atom, units in layout.kept_atoms(keep).items()}
    return stock_model(layout, module, counts) is not None


def _half(families: Sequence[UnitFamily]) -> dict[str, list[int]]:
    return {family.name: list(range(0, family.num_units, 2)) for family in families}


NATIVE = Eligibility(name="native", holds=_runs, is_strict=False)
STOCK = Eligibility(name="stock", holds=_has_config, is_strict=True)
ALL = Eligibility(name="all", holds=lambda *_: True, is_strict=True)
CHOICES: Registry[Eligibility] = Registry(
    "choice of families",
    Eligibility,
    {name: f"structprune.modules.eligible:{name.upper()}" for name in ("native", "stock", "all")},
)


def _protected(layout: ModuleLayout, patterns: Collection[str]) -> set[str]:
    names = [family.name for family in layout.families]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(
                "no family has such a name",
                where="protect",
                got=pattern,
                wanted=", ".join(names[:20]),
                do="give a name, or a pattern such as 'decoder.*'",
            )
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def eligible(
    layout: ModuleLayout,
    choice: str | Callable[[UnitFamily], bool],
    *,
    allow_coupled: bool,
    protect: Collection[str] = (),
) -> frozenset[str]:
    """Name the families that may lose units, without those whose names fit a pattern of `protect`.

    Raises InputError for a pattern that fits no family, UnsupportedError where none is left, with what holds them.
    """
    protected = _protected(layout, protect)
    candidates = [
        family for family in layout.families if (family.is_exact or allow_coupled) and family.name not in protected
    ]
    if callable(choice):
        chosen = [family for family in candidates if choice(family)]
    else:
        rule = CHOICES.get(choice)
        sorts: dict[object, list[UnitFamily]] = {}
        for family in candidates:
            sorts.setdefault((family.pattern, family.num_units), []).append(family)
        chosen = [each for sort in sorts.values() if rule.holds(layout, sort, allow_coupled) for each in sort]
        chosen = chosen or ([] if rule.is_strict else candidates)
    if not chosen:
        held = {"protect"} if protected else set[str]()
        held |= {reason for axis in layout.frozen for reason in axis.reasons[:1]}
        coupled = {operation for family in layout.families for operation in family.couplings}
        raise UnsupportedError(
            "no unit can leave this module by these settings",
            where=type(layout.model).__name__,
            got=f"held by {', '.join(sorted(held | coupled)[:6]) or 'nothing: there are no units'}",
            do="give another choice of families, or allow_coupled=True where a norm sees all units",
        )
    return frozenset(family.name for family in chosen)
