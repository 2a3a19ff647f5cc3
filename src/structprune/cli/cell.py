"""The process of one cell of a comparison, started by `structprune compare`.

    python -m structprune.cli.cell SPEC RESULT

SPEC is a CellSpec as JSON; RESULT appears when the cell is done, whole or not at all. Ctrl-C is the parent's business.
"""

from __future__ import annotations

import sys
from pathlib import Path

from structprune.cli.progress import progress_observer
from structprune.comparison.cell import CellSpec, run_cell
from structprune.files import write_text


def main() -> None:
    """Run the cell that the first argument specifies, and write its result: the entry point of the process."""
    spec = CellSpec.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with progress_observer(quiet=spec.quiet) as observer:
        result = run_cell(spec, observer)
    write_text(Path(sys.argv[2]), result.model_dump_json())


if __name__ == "__main__":
    main()
