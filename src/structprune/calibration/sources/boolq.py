"""The Wikipedia passages of BoolQ as a calibration text."""

from __future__ import annotations

from structprune.calibration.context import CalibrationWindows, SourceContext, draw_windows
from structprune.calibration.sources.packed import BOOLQ


def boolq(context: SourceContext) -> CalibrationWindows:
    """Draw windows from the first nine tenths of the passages."""
    return draw_windows(BOOLQ.split()[0], "boolq passages (first nine tenths)", context)
