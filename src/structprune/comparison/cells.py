"""What a comparison is made of: methods with changed settings, and the recipe of each cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from structprune.engine.pipelines.registry import PIPELINES
from structprune.errors import InputError, UnsupportedError
from structprune.kinds import SCOPES, Scope
from structprune.methods.method import Method
from structprune.recipe import MOST_SAMPLES, Recipe, all_fields, flag_name
from structprune.recipe.limits import TARGETS, targets_of
from structprune.texts import AUTO, WeightedText, shown_texts, weighted_texts
from structprune.types import ModelLayout
from structprune.vocabulary.kept import KeptTokens

# Every cell has its own.
_OF_THE_CELL = ("method", "sparsity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method, perhaps with some of its settings changed."""

    label: str
    """Text of the variant as it was written: `fasp`, or `fasp:target=dense-path,damping=0.01`."""
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])


def parse_variant(text: str) -> Variant:
    """Parse `METHOD` or `METHOD:FIELD=VALUE,FIELD=VALUE`. Raises InputError."""
    method, _, settings = text.partition(":")
    return Variant(label=text, method=method, changes=parse_settings(settings.split(",") if settings else [], text))


def parse_settings(entries: Sequence[str], where: str) -> dict[str, Any]:
    """Read `FIELD=VALUE` entries as recipe fields. Raises InputError for what is no such entry or no such field."""
    result: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        name = name.replace("-", "_")
        if not equals or not value:
            raise InputError("a setting is not usable", where=where, got=repr(entry), wanted="FIELD=VALUE")
        if name not in all_fields() or name in _OF_THE_CELL:
            known = ", ".join(f for f in all_fields() if f not in _OF_THE_CELL)
            raise InputError(f"{name!r} is not a setting of a recipe", where=where, do=f"known: {known}")
        try:
            result[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError("a setting is not usable", where=where, got=repr(entry), wanted=str(error)) from None
    return result


def shared_settings(shared: Mapping[str, Any], variants: Sequence[Variant]) -> dict[str, list[str]]:
    """Find the shared settings that have no meaning for a method: its label -> their flags.

    Raises InputError for a setting that has no meaning for any, or for an unknown method.
    """
    kinds = {v.label: _kind(shared, v) for v in variants}
    fields = {v.label: set(_shared_with(shared, v)) for v in variants}
    names = [name for name in shared if name not in _OF_THE_CELL]
    for name in names:
        asks_nothing = all(kind.asks_nothing(name, shared[name], shared) for kind in kinds.values())
        if not asks_nothing and not any(name in own for own in fields.values()):
            raise InputError(f"{flag_name(name)} has no meaning for any of the methods", got=", ".join(fields))
    return {
        label: left_out
        for label, own in fields.items()
        if (left_out := [flag_name(name) for name in names if name not in own])
    }


def _kind(shared: Mapping[str, Any], variant: Variant) -> type[Recipe]:
    """Find the class of a variant's recipe, by its method and by the pattern that it gets. Raises InputError."""
    return Recipe.kind_for({**shared, **variant.changes, "method": variant.method})


def _shared_with(shared: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Keep the shared settings that have a meaning for a variant, by its method and by what else it is to do."""
    kind = _kind(shared, variant)
    without = kind.idle({**shared, **variant.changes}).keys() - variant.changes.keys()
    return {name: value for name, value in shared.items() if name in kind.model_fields and name not in without}


def common_recipe(shared: Mapping[str, Any]) -> Recipe:
    """Validate what all methods share: device, number format, windows. Raises InputError."""
    if shared.get("time_budget"):
        raise InputError(
            "--time-budget has no meaning where methods are compared: all get as many windows",
            got=shared["time_budget"],
            wanted="--num-samples, by default 128",
        )
    common = {name: value for name, value in shared.items() if name in Recipe.model_fields and name != "method"}
    return Recipe.build(**{"num_samples": MOST_SAMPLES, **common})


def is_limited(shared: Mapping[str, Any], variant: Variant) -> bool:
    """Say whether limits decide how much a variant removes, in the place of a share.

    Raises UnsupportedError for a shared limit that has no meaning for its method: its cells would have another size.
    """
    asked = {**shared, **variant.changes}
    limits = [name for name in TARGETS if asked.get(name) is not None]
    own = _kind(shared, variant).model_fields
    for name in limits:
        if name not in own:
            raise UnsupportedError(f"{flag_name(name)} has no meaning for one of the methods", got=variant.label)
    return bool(limits)


def cell_recipe(shared: Mapping[str, Any], variant: Variant, sparsity: float | None) -> Recipe:
    """Build the recipe of one cell, of the shared settings that have a meaning for its method and of its own.

    Without a share its limits decide. Raises InputError that names the variant's bad setting.
    """
    # As many windows for all, whatever each takes.
    fields = {
        "scope": Recipe().scope,
        "num_samples": MOST_SAMPLES,
        **_shared_with(shared, variant),
    }
    share = {} if sparsity is None else {"sparsity": sparsity}
    return Recipe.build(**{**fields, **variant.changes, "method": variant.method, **share})


def fitted(recipe: Recipe, method: Method, layout: ModelLayout) -> Recipe:
    """Convert the recipe for a method that knows no sublayers: as many parameters are taken from all of the blocks."""
    if PIPELINES.get(method.pipeline).scoped:
        return recipe
    fields = recipe.model_dump(exclude_unset=True)
    if not targets_of(recipe):
        fields["sparsity"] = recipe.sparsity * scope_parameters(layout, recipe.scope) / layout.block_parameters
    # Said, not left out: a cell's process reads its recipe from a file, where every field is there.
    fields["scope"] = "all"
    return Recipe.build(**fields)


def scope_parameters(layout: ModelLayout, scope: Scope) -> int:
    """Count the parameters of the sublayers in `scope`."""
    return sum(
        block.module_parameters(block.group(kind))
        for block in layout.blocks
        for kind in SCOPES[scope]
        if block.has(kind)
    )


def cell_key(recipe: Recipe, identity: Mapping[str, Any]) -> str:
    """Hash of the recipe and of what else decides the figures; the calibration text counts by its content."""
    # Without the defaults, a recipe keeps its hash when recipes learn another field.
    fields = recipe.model_dump(mode="json", exclude_defaults=True) | {"method": recipe.method}
    fields["calibration"] = calibration_identity(recipe.texts)
    if recipe.vocabulary_text:
        fields["vocabulary_text"] = calibration_identity(weighted_texts(recipe.vocabulary_text))
    text = json.dumps([fields, dict(identity)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def calibration_identity(texts: Sequence[WeightedText]) -> str:
    """Name files by their hashes, sources by their names; weights that are not one behind them."""
    return ", ".join(_text_identity(text) + (f":{text.weight:g}" if text.weight != 1 else "") for text in texts)


def _text_identity(text: WeightedText) -> str:
    if text.path is not None:
        return file_sha256(text.path)
    return "default" if text.name == AUTO else text.name


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError("the text cannot be read", where=str(path), got=error.strerror) from None


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that differ from the defaults, without paths and those that have a column of their own."""
    changed = recipe.model_dump(mode="json", exclude_defaults=True)
    for name in ("method", "sparsity", "scope", "memory", "device_memory"):
        changed.pop(name, None)
    if "calibration" in changed:
        changed["calibration"] = shown_texts(recipe.calibration)
    if "vocabulary_text" in changed:
        changed["vocabulary_text"] = shown_texts(recipe.vocabulary_text)
    if isinstance(recipe.vocabulary, KeptTokens) and recipe.vocabulary:
        changed["vocabulary"] = f"{len(recipe.vocabulary.ids)} tokens of a list"
    return changed
