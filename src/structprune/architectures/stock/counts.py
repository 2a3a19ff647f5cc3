"""What a config may ask for before anything is built of it."""

from __future__ import annotations

from structprune.architectures.stock.tensor_check import advice_on_missing
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError

# Config entries that say how many modules are built.
_COUNTS = ("num_hidden_layers", "n_layer", "num_experts")


def check_counts(reader: CheckpointReader) -> None:
    """Raise CheckpointError for more blocks or experts than there are tensors: building them would take for ever."""
    for name in _COUNTS:
        count = reader.config.get(name)
        if isinstance(count, int | float) and count > len(reader.shapes):
            raise CheckpointError(
                f"{name} is larger than the number of tensors",
                where=str(reader.directory / "config.json"),
                got=f"{count:g}" if isinstance(count, float) else f"{str(count)[:20]}",
                wanted=f"at most {len(reader.shapes)}",
                do=advice_on_missing(reader),
            )
