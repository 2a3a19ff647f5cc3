"""The teacher's last hidden states, computed a few windows ahead of their use and kept.

Shape suffixes: N windows, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from structprune.calibration.store import HiddenStore
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.embed import embed, open_store
from structprune.engine.streaming.model import StreamedModel
from structprune.memory import release_free_memory


class Teacher:
    """Streams the dense model over the windows that are asked for, one block in memory at a time.

    Window by window, so that a window's states do not depend on which others were asked for with it.
    """

    def __init__(self, streamed: StreamedModel, path: Path) -> None:
        num_windows = len(streamed.windows.ids_NS)
        self._streamed = streamed
        self._store: HiddenStore = open_store(streamed, path, num_windows)
        self._propagator = embed(streamed, {self._store: num_windows})
        self._done: set[int] = set()

    def ensure(self, windows: Iterable[int]) -> None:
        """Have the states of these windows. Raises NumericalError if they are not finite."""
        missing = [number for number in dict.fromkeys(windows) if number not in self._done]
        if not missing:
            return
        for block in self._streamed.stock.layout.blocks:
            module = load_block(self._streamed, block)[1]
            with self._propagator.writing(self._store) as put:
                for number, hidden_BSD in self._propagator.read_each(self._store, missing):
                    put(number, self._propagator.apply(module, block.index, hidden_BSD))
            del module
            release_free_memory()
        self._done.update(missing)

    def prepare(self, windows: Sequence[int]) -> None:
        """Have all of these if the first is missing: each block is read once for all of them."""
        if windows[0] not in self._done:
            self.ensure(windows)

    def hidden_SD(self, number: int) -> Tensor:
        """Read the states behind the last block of one window to the device."""
        assert number in self._done
        return self._store.read(number, number + 1)[0].to(self._streamed.device)

    def close(self) -> None:
        self._store.close()
