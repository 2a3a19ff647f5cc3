"""Options of the command line, made from the fields of the settings that they fill."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from structprune.errors import InputError, StructPruneError
from structprune.ranks import launched
from structprune.recipe import Flag, Group, Recipe, all_fields
from structprune.recipe.fields import flag_of
from structprune.recipe.path import PATH_NAME, with_allocation

Verb = Callable[..., None]
_RECIPE_FILE = inspect.Parameter(
    "recipe",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[Path | None, typer.Option(help="YAML file of these settings; flags win.")],
)
_ALLOCATION_FILE = inspect.Parameter(
    "allocation",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            help=f"An earlier run's {PATH_NAME}: the widths for --sparsity follow from what it has measured.",
            rich_help_panel=Group.WHAT.value,
        ),
    ],
)


def takes_recipe(verb: Verb) -> Verb:
    """Give `verb` an option for every field of a recipe, and `--recipe`; its parameter `settings` gets the Recipe."""

    def build(values: dict[str, Any]) -> Recipe:
        return _built(*_asked(values))

    return takes_fields(all_fields(), build, _RECIPE_FILE, _ALLOCATION_FILE)(verb)


def takes_recipes(verb: Verb) -> Verb:
    """Give `verb` the options of `takes_recipe`, with several shares: `settings` gets name -> Recipe, one for each.

    A single share has the empty name.
    """

    def build(values: dict[str, Any]) -> dict[str, Recipe]:
        fields, allocation = _asked(values)
        asked = str(fields.get("sparsity", ""))
        if "," not in asked:
            return {"": _built(fields, allocation)}
        found: dict[str, Recipe] = {}
        for text in asked.split(","):
            share = Recipe.build(sparsity=text).sparsity
            if f"{share:g}" in found:
                raise InputError("--sparsity names a share twice", got=asked, wanted="each once, such as 0.1,0.2,0.3")
            found[f"{share:g}"] = _built({**fields, "sparsity": share}, allocation)
        return found

    return takes_fields(all_fields(), build, _RECIPE_FILE, _ALLOCATION_FILE)(verb)


def _asked(values: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """Return the settings of the file and the command line, unvalidated, and the file that widths are read from."""
    recipe, allocation, fields = values.pop("recipe"), values.pop("allocation"), given(values)
    return (fields if recipe is None else Recipe.merged_values(recipe, fields)), allocation


def _built(fields: dict[str, Any], allocation: Path | None) -> Recipe:
    """Validate the settings, with the widths of their share where those are read from a file."""
    if allocation is None:
        return Recipe.build(**fields)
    share = Recipe.build(**{name: fields[name] for name in ("sparsity",) if name in fields}).sparsity
    return Recipe.build(**with_allocation(fields, allocation, share))


def takes_fields(
    fields: Mapping[str, FieldInfo], build: Callable[[dict[str, Any]], Any], *more: inspect.Parameter
) -> Callable[[Verb], Verb]:
    """Give a verb an option for each of `fields`, and `more`; its parameter `settings` gets what `build` makes of them.

    An option that is not on the command line has the value None. A verb with a parameter of an option's name gets its
    value too.
    """
    flags = {parameter.name: parameter for parameter in (*more, *(option_of(name, f) for name, f in fields.items()))}

    def decorate(verb: Verb) -> Verb:
        own = inspect.signature(verb, eval_str=True).parameters
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in own.items()
            if name != "settings" and name not in flags
        ]

        @functools.wraps(verb)
        def command(**values: Any) -> None:
            given = {name: values.pop(name) for name in flags}
            values |= {name: given[name] for name in flags if name in own}
            try:
                settings = build(given)
            except StructPruneError as error:
                # Of several ranks each finds it, before any has heard of another: the first one tells.
                error.elsewhere = launched()[0] > 0
                raise
            verb(settings=settings, **values)

        # typer reads the options from here.
        command.__dict__["__signature__"] = inspect.Signature([*parameters, *flags.values()])
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *flags.values())}
        return command

    return decorate


def option_of(name: str, field: FieldInfo) -> inspect.Parameter:
    """Describe the option of one field: its type, group and default as typer wants them."""
    flag = flag_of(field)
    kind, option = _kind(field), "--" + name.replace("_", "-")
    names = flag.names or (f"{option}/--no-{option[2:]}" if kind is bool else option)
    text = (field.description or "").rstrip(".")
    text = f"{text[0].upper()}{text[1:]}.  [default: {_default(field, flag)}]"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(names, help=text, rich_help_panel=flag.group.value)],
    )


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the options that are on the command line."""
    # An option that may come several times is an empty list where it is not there.
    return {name: value for name, value in values.items() if value is not None and value != []}


def _kind(field: FieldInfo) -> Any:
    """Find the Python type that typer is to read; texts are read further by the field itself."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if kinds[-1] is Ellipsis:
        return list[kinds[0]]
    reads_text = any(isinstance(entry, BeforeValidator) for entry in field.metadata)
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, bool) and not reads_text else str


def _default(field: FieldInfo, flag: Flag) -> str:
    if flag.unset:
        return flag.unset
    value = field.default
    if isinstance(value, int) and _kind(field) is str:
        # A number that is read from a text is a size.
        return f"{value / 10**9:g}GB"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
