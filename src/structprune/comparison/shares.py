"""One model at several shares in one go: a folder with an output for each, and one measurement of the dense model."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from structprune.api import check, prune
from structprune.assess.split import decided_for_a_check
from structprune.engine.run.finalize import load_report
from structprune.errors import InputError, StructPruneError
from structprune.files import check_path, expand_user, make_folder, read_json, write_json
from structprune.observer import Observer, SilentObserver
from structprune.ranks import refuse_ranks
from structprune.recipe import Recipe
from structprune.results.report import PruneReport
from structprune.results.schema import REPORT_NAME

SHARES_NAME = "shares.json"
_SHARED_NAME = "measured"


class Started(BaseModel, frozen=True, extra="forbid"):
    """What was asked for, as the folder keeps it."""

    model: str
    directory: str
    """Where relative paths in the settings count from."""
    num_samples: int
    """Calibration windows of every run: the same ones, so that what is measured on them is measured once."""
    recipes: Annotated[dict[str, dict[str, object]], Field(min_length=1)]
    """Name of an output in the folder -> what was asked of its run."""


def prune_shares(
    model: str | Path, recipes: Mapping[str, Recipe], output: str | Path, observer: Observer | None = None
) -> dict[str, PruneReport]:
    """Prune `model` by each recipe into a folder of its name in `output`; they differ in how much goes.

    All take the same calibration windows, as many as the first recipe has time for, and what the first one measures of
    the dense model is there for the others. Outputs that are finished stay as they are, so an interrupted call goes on
    when it is made again. Raises a subclass of StructPruneError.
    """
    refuse_ranks("pruning to several shares")
    observer, folder = observer or SilentObserver(), expand_user(str(output))
    check_path(folder, "the folder of several shares", spare=max(map(len, recipes)) + len("/.rejected"))
    asked = {name: recipe.model_dump(mode="json", exclude_unset=True) for name, recipe in recipes.items()}
    before = _find(folder) if _is_begun(folder) else None
    if before is not None and (before.model, before.recipes) != (str(model), asked):
        raise InputError(
            "the folder was begun with other shares, settings or another model",
            where=str(folder),
            do="ask for the same, or choose another -o",
        )
    if before is None:
        resolved = [check(model, decided_for_a_check(model, recipe)) for recipe in recipes.values()]
        started = Started(
            model=str(model),
            directory=os.getcwd(),  # noqa: PTH109 - a string, as the journal keeps it
            num_samples=resolved[0].recipe.num_samples,
            recipes=asked,
        )
        made = _made(folder)
        write_json(folder / SHARES_NAME, started.model_dump(mode="json"))
    else:
        started, made = before, False
    try:
        return _run(started, recipes, folder, observer)
    except StructPruneError:
        # An error of the input leaves nothing half-written.
        if not _is_begun(folder):
            (folder / SHARES_NAME).unlink()
            shutil.rmtree(folder / _SHARED_NAME, ignore_errors=True)
            if made:
                folder.rmdir()
        raise


def _made(folder: Path) -> bool:
    """Make the folder, and say whether it was not there. Raises InputError for one that holds something else."""
    _find(folder)
    there = folder.is_dir()
    make_folder(folder, "the folder of several shares")
    return not there


def _is_begun(folder: Path) -> bool:
    """Whether any run has left something in the folder."""
    own = (SHARES_NAME, _SHARED_NAME)
    return folder.is_dir() and any(path.name not in own for path in folder.iterdir())


def find_shares(output: Path) -> Started | None:
    """Read what was asked for of a folder of several shares; None where it is none."""
    return _find(output) if (output / SHARES_NAME).is_file() else None


def resume_shares(output: str | Path, observer: Observer | None = None) -> dict[str, PruneReport]:
    """Go on with an interrupted `prune_shares`. Raises InputError if the folder is none of several shares."""
    folder = Path(os.path.abspath(expand_user(str(output))))  # noqa: PTH100 - resolve() would follow a link
    started = _find(folder)
    if started is None:
        raise InputError("there is no folder of several shares", where=str(folder))
    recipes = {name: Recipe.build(**values) for name, values in started.recipes.items()}
    # Paths in the settings count from where the runs were started.
    with contextlib.chdir(started.directory):
        return _run(started, recipes, folder, observer or SilentObserver())


def _run(started: Started, recipes: Mapping[str, Recipe], folder: Path, observer: Observer) -> dict[str, PruneReport]:
    reports: dict[str, PruneReport] = {}
    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        place = folder / name
        observer.note(f"[{number}/{len(recipes)}] {name}")
        if (place / REPORT_NAME).is_file() and not (folder / f"{name}.partial").exists():
            reports[name] = load_report(place)
            continue
        counted = recipe.model_copy(update={"num_samples": started.num_samples, "time_budget": None})
        reports[name] = prune(started.model, counted, place, observer, folder / _SHARED_NAME)
    shutil.rmtree(folder / _SHARED_NAME, ignore_errors=True)
    return reports


def _find(folder: Path) -> Started | None:
    """Read the folder's own file; None where there is no folder. Raises InputError for somebody else's."""
    if not os.path.lexists(folder):
        return None
    file = folder / SHARES_NAME
    if folder.is_dir() and not any(folder.iterdir()):
        return None
    if not file.is_file():
        raise InputError(
            "the output exists and is no folder of several shares", where=str(folder), do="choose another -o"
        )
    try:
        return Started.model_validate(read_json(file))
    except ValidationError:
        raise InputError("the file is not as it was written", where=str(file), do="choose another -o") from None
