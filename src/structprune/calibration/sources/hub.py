"""WikiText-2 and C4 through the `datasets` library (extra `data`)."""

from __future__ import annotations

from typing import Any

from structprune.calibration.context import CalibrationWindows, Source, SourceContext, draw_windows
from structprune.errors import InputError, first_line

_C4_SHARD = "en/c4-train.00000-of-01024.json.gz"


def _load(name: str, *args: Any, **kwargs: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"calibration source {name!r} needs the datasets package", do="pip install 'structprune[data]'"
        ) from None
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:
        # datasets raises its own, requests' and the hub's types for an unreachable hub; all mean the same here.
        raise InputError(
            f"calibration source {name!r} cannot be fetched",
            got=f"{type(error).__name__}: {first_line(error)}",
            do="pass a text file as --calibration, or --calibration boolq or self",
        ) from error


def wikitext2(context: SourceContext) -> CalibrationWindows:
    """Draw windows from WikiText-2 raw, train split, rows joined by blank lines."""
    rows = _load("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split="train")
    return draw_windows("\n\n".join(rows["text"]), "wikitext2 (raw, train)", context)


def c4(context: SourceContext) -> CalibrationWindows:
    """Draw windows from C4's first training shard, streamed until there is ample text for the windows."""
    rows = _load("c4", "allenai/c4", data_files={"train": _C4_SHARD}, split="train", streaming=True)
    texts: list[str] = []
    # Twice the tokens at six characters each, so that the draw is a draw.
    wanted = 2 * 6 * context.num_samples * context.seq_len
    length = 0
    for row in rows:
        texts.append(row["text"])
        length += len(row["text"])
        if length >= wanted:
            break
    return draw_windows("\n\n".join(texts), "c4 (en, first training shard)", context)


WIKITEXT2 = Source(draw=wikitext2, packages=("datasets",), remote=True)
C4 = Source(draw=c4, packages=("datasets",), remote=True)
