"""Text that the model samples itself, from its start token at temperature 1: calibration with no data at all."""

from __future__ import annotations

from structprune.calibration.context import CalibrationWindows, Source, SourceContext

# Held-out windows are sampled by themselves, so that the others are the same with and without them.
_HELD_OUT_SEED = 2**32


def self_sampled(context: SourceContext) -> CalibrationWindows:
    """Sample `num_samples` windows of the model's own text, and the held-out ones."""
    ids_NS = context.sample(context.num_samples, context.seq_len, context.seed)
    held_out_NS = None
    if context.num_held_out:
        # Seeds have 63 bits.
        seed = (context.seed + _HELD_OUT_SEED) % 2**63
        held_out_NS = context.sample(context.num_held_out, context.seq_len, seed)
    return CalibrationWindows(ids_NS=ids_NS, description="self-sampled text (temperature 1)", held_out_NS=held_out_NS)


SELF_SAMPLED = Source(draw=self_sampled)
