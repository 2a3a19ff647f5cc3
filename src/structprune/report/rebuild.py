"""The pages of a finished directory, made again from its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from structprune.errors import InputError
from structprune.files import check_regular, write_text
from structprune.report.comparison_page import COMPARISON_PAGE_NAME, comparison_page
from structprune.report.page import PAGE_NAME, prune_page
from structprune.report.plots import check_matplotlib, plot_comparison, plot_report
from structprune.results.comparison import COMPARISON_VERSION, RESULT_NAME, Comparison
from structprune.results.measured import MEASURED_VERSION, Bench, Evaluation
from structprune.results.report import PruneReport
from structprune.results.schema import REPORT_NAME, SCHEMA_VERSION

_Model = TypeVar("_Model", bound=BaseModel)


def rebuild(directory: Path, measured: Sequence[Path] = (), *, png: bool = False) -> list[Path]:
    """Write the page of the run or comparison in `directory`, with `png` its curves too; returns the files.

    `measured` are files with what `eval --json` or `bench --json` printed; their figures go into the table before and
    after. Raises InputError.
    """
    if png:
        check_matplotlib()
    if (directory / REPORT_NAME).is_file():
        report = read_report(directory)
        page = directory / PAGE_NAME
        given = [_read_measured(path) for path in measured]
        write_text(page, _drawn(lambda: prune_page(report, given), directory / REPORT_NAME))
        return [page, *(plot_report(report, directory) if png else ())]
    if (directory / RESULT_NAME).is_file():
        if measured:
            raise InputError("a comparison has its own measurements", got="--with", wanted="a pruned model's directory")
        comparison = _validated(directory / RESULT_NAME, Comparison, COMPARISON_VERSION)
        page = directory / COMPARISON_PAGE_NAME
        write_text(page, _drawn(lambda: comparison_page(comparison), directory / RESULT_NAME))
        return [page, *(plot_comparison(comparison, directory) if png and comparison.cells else ())]
    raise InputError(
        "the directory holds no report",
        where=str(directory),
        wanted=f"{REPORT_NAME} of `structprune prune`, or {RESULT_NAME} of `structprune compare`",
    )


def _drawn(page: Callable[[], str], source: Path) -> str:
    """Draw the page; raises InputError where numbers of the file, such as sizes of zero, allow none."""
    try:
        return page()
    except (ArithmeticError, ValueError) as error:
        raise InputError(
            "the file holds numbers that no run writes", where=str(source), got=str(error) or type(error).__name__
        ) from None


def read_report(directory: Path) -> PruneReport:
    """Read the report in the output of a run. Raises InputError."""
    return _validated(directory / REPORT_NAME, PruneReport, SCHEMA_VERSION)


def _read_measured(path: Path) -> Evaluation | Bench:
    kind = _read_json(path).get("kind")
    kinds: dict[str, type[Evaluation] | type[Bench]] = {"evaluation": Evaluation, "bench": Bench}
    if kind not in kinds:
        raise InputError(
            "the file holds no measurement",
            where=str(path),
            wanted="what `structprune eval --json` or `structprune bench --json` printed",
        )
    return _validated(path, kinds[kind], MEASURED_VERSION)


def _validated(path: Path, model: type[_Model], version: int) -> _Model:
    data = _read_json(path)
    found = data.get("schema_version")
    if isinstance(found, int) and found > version:
        raise InputError(
            "the file was written by a newer structprune",
            where=str(path),
            got=f"schema_version {found}",
            wanted=f"at most {version}",
            do="upgrade structprune",
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError("the file is not as it was written", where=str(path), got=f"{where}: {first['msg']}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        check_regular(path)
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("the file cannot be read as JSON", where=str(path), got=str(error)) from None
    if not isinstance(data, dict):
        raise InputError("the file cannot be read", where=str(path), got=type(data).__name__, wanted="a JSON object")
    return data
