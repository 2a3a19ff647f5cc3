"""Text that the model samples itself, from its start token at temperature 1: calibration with no data at all."""

from __future__ import annotations

from structprune.calibration.context import CalibrationWindows, Source, SourceContext


def self_sampled(context: SourceContext) -> CalibrationWindows:
    """Sample `num_samples` windows of the model's own text."""
    ids_NS = context.sample(context.num_samples, context.seq_len, context.seed)
    return CalibrationWindows(ids_NS=ids_NS, description="self-sampled text (temperature 1)")


SELF_SAMPLED = Source(draw=self_sampled)
