"""Source code of Python's standard library as a calibration text: program text that every machine with Python has.

Its licence is Python's own (PSF). The library's tests, its demonstrations and what was installed beside it are left
out. Its documentation is not used: it is what benchmarks take for a text that nothing was calibrated on.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

from structprune.calibration.context import CalibrationWindows, Source, SourceContext, draw_windows
from structprune.errors import InputError

_LEFT_OUT = frozenset(
    {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
)
# No module, however long, is more than a small part of the text.
_MOST_CHARACTERS = 12_000
# Twice the tokens at four characters each, so that the draw is a draw.
_CHARACTERS_PER_TOKEN = 2 * 4


def python_code(context: SourceContext) -> CalibrationWindows:
    """Draw windows from modules in a seeded order, each cut where it is long. Raises InputError if there are none."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(path for path in library.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(library).parts))
    order = torch.randperm(len(modules), generator=torch.Generator().manual_seed(context.seed)).tolist()
    wanted = _CHARACTERS_PER_TOKEN * (context.num_samples + context.num_held_out) * context.seq_len
    texts: list[str] = []
    length = 0
    for index in order:
        text = modules[index].read_text(encoding="utf-8", errors="ignore")[:_MOST_CHARACTERS]
        texts.append(text)
        length += len(text)
        if length >= wanted:
            break
    if not length:
        raise InputError(
            "this Python has no source code of its library", where=str(library), do="give a file as --calibration"
        )
    return draw_windows("\n\n".join(texts), "python (source code of its standard library)", context)


PYTHON = Source(draw=python_code)
