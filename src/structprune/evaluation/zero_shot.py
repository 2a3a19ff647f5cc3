"""Zero-shot tasks: lm-eval asks and scores, here is only what lies between it and a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structprune.architectures.stock.loading import only_errors
from structprune.errors import InputError, first_line

# Its log lines are left out; its progress bars stay, on standard error.
_LOGGER = "lm_eval"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One task."""

    task: str
    metrics: dict[str, float]
    standard_errors: dict[str, float]
    num_samples: int
    num_fewshot: int
    version: str


class TaskRunner:
    """The tasks of one call with their data, loaded before any model; without names all of `tasks_dir`.

    Raises InputError if lm-eval is missing, a task is unknown, or its data cannot be had.
    """

    def __init__(self, tasks: Sequence[str], tasks_dir: Path | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InputError(
                "zero-shot tasks need lm-eval", do="install it with `pip install 'structprune[eval]'`"
            ) from None
        if tasks_dir is not None and not list(tasks_dir.glob("*.yaml")):
            raise InputError(
                "the directory holds no task files",
                where=str(tasks_dir),
                wanted="lm-eval's yaml files",
                do="write those of the seven usual tasks with `python -m structprune.evaluation.local_tasks DIR`",
            )
        with only_errors(_LOGGER):
            # Of a directory only its own tasks are known: a name that is missing there would go to the hub.
            manager: Any = TaskManager(
                include_path=None if tasks_dir is None else str(tasks_dir), include_defaults=tasks_dir is None
            )
            names = list(dict.fromkeys(tasks)) or list(manager.all_subtasks)
            unknown = [name for name in names if name not in manager.all_tasks]
            if unknown:
                raise InputError(
                    f"lm-eval has no task {unknown[0]!r}",
                    where=None if tasks_dir is None else str(tasks_dir),
                    do="see `lm-eval ls tasks`" if tasks_dir is None else f"known: {', '.join(manager.all_subtasks)}",
                )
            try:
                self._tasks = list(manager.load(names)["tasks"].values())
            except Exception as error:
                # Data sets come through several libraries, each with its own errors for a hub that is not reached.
                raise InputError(
                    "the data of a task cannot be loaded",
                    where=", ".join(names),
                    got=f"{type(error).__name__}: {first_line(error)}",
                    do="check the network, or give local task files with --tasks-dir",
                ) from error

    def run(self, model: Any, tokenizer: Any, *, limit: int | None, batch_size: int, starts: bool) -> list[TaskScore]:
        """Score a stock model, without examples in the prompt unless a task says otherwise.

        `limit`: only the first so many samples of each task. `starts`: prompts begin with the tokenizer's start token.
        """
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with only_errors(_LOGGER):
            wrapped: Any = HFLM(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, add_bos_token=starts
            )
            found: Any = simple_evaluate(wrapped, tasks=self._tasks, limit=limit, log_samples=False)
        return [_score(found, task) for task in found["results"]]


def _score(found: Any, task: str) -> TaskScore:
    """Convert lm-eval's results, whose values are named `acc,none` and `acc_stderr,none` (metric and filter)."""
    numbers = {
        name.partition(",")[0]: float(value)
        for name, value in found["results"][task].items()
        if isinstance(value, int | float) and "," in name
    }
    suffix = "_stderr"
    return TaskScore(
        task=task,
        metrics={name: value for name, value in numbers.items() if not name.endswith(suffix)},
        standard_errors={n.removesuffix(suffix): value for n, value in numbers.items() if n.endswith(suffix)},
        num_samples=int(found["n-samples"][task]["effective"]),
        num_fewshot=int(found["n-shot"].get(task) or 0),
        version=str(found["versions"].get(task, "")),
    )
