"""The start of a run, or of its going on: what makes two runs the same one, and the windows that they read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from structprune.calibration.context import CalibrationWindows, TextWindows
from structprune.calibration.select import fingerprint
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.planning.plan import Budgets, PrunePlan
from structprune.engine.run.versions import versions
from structprune.errors import InputError
from structprune.files import file_sum
from structprune.recipe import Recipe, ResolvedRecipe
from structprune.recipe.limits import TARGETS
from structprune.recipe.tokens import WantedTokens
from structprune.runs.contents import file_contents, sums
from structprune.runs.directory import WINDOWS_NAME, RunDirectory, check_free_disk
from structprune.texts import WeightedText, weighted_texts
from structprune.vocabulary.kept import ALL_TOKENS, KeptTokens

_WINDOWS = "windows"
# Characters of a value: a list of tokens has many.
_SHOWN = 200
# Of a resolved recipe these are what was found: free memory, and texts that were counted on to decide.
_ASKED = {"memory", "device_memory", "vocabulary_text", "drop_reserve"}
# Tensors of the file that keeps them.
_IDS, _HELD_OUT, _REPAIR = "ids", "held_out", "repair"
_PARTS = {
    "recipe": "with other settings",
    "source": "from another source checkpoint",
    "source_files": "from another source checkpoint (a file holds something else)",
    "versions": "by other versions",
    "windows": "on another calibration text",
    "held_out": "with other held-out windows",
}


def identity(
    reader: CheckpointReader, recipe: ResolvedRecipe, asked: Recipe, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Put into JSON what makes two runs the same one; of budgets, what was asked for.

    The source's files are read for their checksums, but for those that `before`, the first step of a run that was cut,
    knows and that were not written to since.
    """
    contents = file_contents(reader.content_files, (before or {}).get("source_contents"))
    settings = recipe.model_dump(mode="json") | asked.model_dump(mode="json", include=_ASKED)
    return {
        "recipe": settings,
        "recipe_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "source": reader.fingerprint(),
        "source_files": sums(contents),
        "source_contents": contents,
        "versions": versions(),
    }


def check_same(
    before: Mapping[str, Any], now: Mapping[str, Any], staging: Path, parts: Mapping[str, str] = _PARTS
) -> None:
    """Raise InputError that shows the difference, if the run that was cut is another one than the one that is asked.

    `parts`: what both runs say of themselves -> how one that says something else was started.
    """
    do = f"ask for the same, remove {staging} to start again, or choose another -o"
    if not parts.keys() <= before.keys():
        raise InputError("the unfinished run here was started by another command", where=str(staging), do=do)
    for part, what in parts.items():
        if before[part] != now[part]:
            raise InputError(
                f"the unfinished run here was started {what}",
                where=str(staging),
                got=_difference(now[part], before[part]),
                wanted=_difference(before[part], now[part]),
                do=do,
            )


def _difference(shown: Any, other: Any) -> str:
    """List the entries in which `shown` is not `other`."""
    if not isinstance(shown, dict) or not isinstance(other, dict):
        return str(shown)[:12]
    changed = [
        f"{name} {str(value)[:_SHOWN]}" for name, value in shown.items() if name not in other or other[name] != value
    ]
    return ", ".join(changed) or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What the user asked for."""

    model: str
    asked: Recipe
    directory: str = field(default_factory=os.getcwd)
    """Where relative paths in the settings count from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRun:
    """What a run works by from its first step on."""

    plan: PrunePlan
    name: str
    """Name of the source of the windows, or names of several."""
    windows: CalibrationWindows

    @property
    def calibration(self) -> tuple[str, ...]:
        """The texts that were used, as a recipe names them."""
        texts = self.windows.texts
        return tuple(text.name if text.weight == 1 else f"{text.name}:{text.weight:g}" for text in texts) or (
            self.name,
        )


def find_request(run: RunDirectory) -> RunRequest | None:
    """Read what was asked of the interrupted run in this directory; None without one."""
    line = run.peek()
    if line is None:
        return None
    return RunRequest(model=line["model"], asked=Recipe.build(**line["asked"]), directory=line["directory"])


def as_begun(recipe: Recipe, run: RunDirectory, note: Callable[[str], None]) -> Recipe:
    """Take from a run that was cut here what was chosen when it began: the number of windows, for the machine as it was
    then, and the tokens, by texts that are not counted again."""
    line = run.peek()
    if line is None or "recipe" not in line:
        return recipe
    begun: dict[str, Any] = {}
    if recipe.num_samples is None:
        begun |= {"num_samples": line["recipe"]["num_samples"], "time_budget": 0}
        note(f"going on with the {begun['num_samples']} calibration windows that the run was begun with")
    if isinstance(recipe.vocabulary, WantedTokens) and _decided_alike(recipe, line):
        begun_with = line["recipe"].get("vocabulary")
        tokens = KeptTokens.model_validate(begun_with) if begun_with else ALL_TOKENS
        recipe = recipe.with_tokens(tokens)
        note(
            f"going on with the {len(tokens.ids):,} tokens that the run was begun with" if tokens else "all tokens stay"
        )
    return recipe.model_copy(update=begun)


def _decided_alike(recipe: Recipe, line: Mapping[str, Any]) -> bool:
    """Whether the run that was cut here decided its tokens by the same number and texts."""
    before = Recipe.build(**line["asked"])
    names = ("vocabulary", "vocabulary_text", "drop_reserve", "calibration", "merge_adapter", "scope", *TARGETS)
    return all(getattr(before, name, None) == getattr(recipe, name, None) for name in names)


def begin_or_go_on(
    run: RunDirectory,
    reader: CheckpointReader,
    recipe: ResolvedRecipe,
    start: RunRequest,
    plan: Callable[[Budgets, int], PrunePlan],
    read_windows: Callable[[PrunePlan], tuple[str, CalibrationWindows]],
) -> StartedRun:
    """Take the first step of a run, or that of the run which was cut here.

    `plan` is called with (budgets, windows). Raises InputError if another run was cut here.
    """
    before = run.start
    same = identity(reader, recipe, start.asked, before)
    budgets, num_samples = Budgets(host=recipe.memory, device=recipe.device_memory or None), recipe.num_samples
    if before is not None:
        # What the windows are is not known yet.
        unknown = {name: before.get(name) for name in ("windows", "held_out", "repair")}
        check_same(before, {**same, **unknown}, run.staging)
        # The plan is one for the memory that was free then: another one adds up in another order.
        budgets = Budgets(host=before["budget_bytes"], device=before["device_budget_bytes"])
    chosen = plan(budgets, num_samples)
    found = _find_windows(run, begun=before is not None)
    if found is None:
        found = read_windows(chosen)
        _keep_windows(run, *found, counted=start.asked.vocabulary_text)
    name, windows = found
    same |= {
        "windows": fingerprint(windows.ids_NS),
        "held_out": "none" if windows.held_out_NS is None else fingerprint(windows.held_out_NS),
        "repair": "none" if windows.repair_NS is None else fingerprint(windows.repair_NS),
    }
    check_free_disk(run.output, chosen.disk_bytes - run.used_bytes())
    if len(windows.ids_NS) < num_samples:
        chosen = plan(budgets, len(windows.ids_NS))
    if before is not None:
        check_same(before, same, run.staging)
        run.go_on()
    else:
        run.begin(
            **same,
            budget_bytes=chosen.budgets.host,
            device_budget_bytes=chosen.budgets.device,
            model=start.model,
            asked=start.asked.model_dump(mode="json", exclude_unset=True),
            directory=start.directory,
        )
    return StartedRun(plan=chosen, name=name, windows=windows)


def _keep_windows(run: RunDirectory, name: str, windows: CalibrationWindows, *, counted: Sequence[str]) -> None:
    """Store the windows for a resumed run: they may have been sampled, or their text may be gone by then.

    `counted` are texts that tokens were counted on beside those of the windows.
    """
    path = run.staging / WINDOWS_NAME
    kinds = {_IDS: windows.ids_NS, _HELD_OUT: windows.held_out_NS, _REPAIR: windows.repair_NS}
    save_file({name: ids_NS.contiguous() for name, ids_NS in kinds.items() if ids_NS is not None}, path)
    names = [text.name for text in windows.texts] or [name]
    names += [text.name for text in weighted_texts(counted)]
    files = [file for file in (WeightedText(name=name).path for name in names) if file is not None]
    text_sums = {str(file): file_sum(file) for file in files}
    values: dict[str, Any] = {
        "description": windows.description,
        "start": windows.start,
        "set_apart": windows.set_apart,
    }
    values["held_out_bytes"] = windows.held_out_bytes
    texts = [asdict(text) for text in windows.texts]
    run.journal.record(_WINDOWS, [path], name=name, text_sums=text_sums, texts=texts, **values)


def _find_windows(run: RunDirectory, *, begun: bool) -> tuple[str, CalibrationWindows] | None:
    """Load the stored windows and the name of their source; None if there are none.

    Raises InputError if the run has `begun` and its text holds something else by now; a text that is gone is no error.
    """
    line = run.journal.find(_WINDOWS)
    if line is None:
        return None
    for path in (Path(name) for name in line["text_sums"]):
        if not path.is_file() or file_sum(path) == line["text_sums"][str(path)]:
            continue
        if not begun:
            return None
        raise InputError(
            "the unfinished run here was started on another calibration text (the file holds something else)",
            where=str(path),
            do=f"put the text back, remove {run.staging} to start again, or choose another -o",
        )
    tensors = load_file(run.staging / WINDOWS_NAME)
    return line["name"], CalibrationWindows(
        ids_NS=tensors[_IDS],
        description=line["description"],
        held_out_NS=tensors.get(_HELD_OUT),
        repair_NS=tensors.get(_REPAIR),
        set_apart=line["set_apart"],
        start=line["start"],
        held_out_bytes=line.get("held_out_bytes"),
        texts=tuple(
            TextWindows(**{**text, **{name: tuple(text[name]) for name in ("windows", "held_out", "repair")}})
            for text in line["texts"]
        ),
    )
