"""The processes that share one run, each with its part of the calibration windows; here the trivial case of one.

Rank r of R has the windows r, r + R, r + 2 R, ...: whatever counts from the first window (held-out windows, those of
the backward pass, the reported ones) is spread over all ranks. The case of several is in `engine/ranks/group.py`; the
code that uses a `Ranks` is the same for both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from structprune.errors import InputError

if TYPE_CHECKING:
    # A wrong flag should not wait for torch.
    from torch import Tensor

Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)
Task = tuple[int, Callable[[], Result]]
"""The rank that does it, and what it does."""
RANK_TIMEOUT_S = 600.0
"""How long others are waited for: longer than the slowest rank takes for its windows in one block."""


class Ranks:
    """One process that does everything; subclasses share the work. All ranks call the same methods in the same order.

    A call inside of `broadcast` or of a task is that rank's own: it exchanges nothing there.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and tells the user."""
        return self.rank == 0

    def local_range(self, first: int, last: int) -> tuple[int, int]:
        """Return which of this rank's windows, counted among its own, are the run's windows first..last."""
        return _upward(first - self.rank, self.size), _upward(last - self.rank, self.size)

    def num_local(self, num_windows: int) -> int:
        """Return how many of the run's first `num_windows` windows are this rank's."""
        return self.local_range(0, num_windows)[1]

    def broadcast(self, work: Callable[[], Result]) -> Result:
        """Return or raise on every rank what `work` does on the first one. Elsewhere it is not called."""
        return work()

    def all_gather(self, tasks: Mapping[Key, Task[Result]]) -> dict[Key, Result]:
        """Run each rank's tasks, all at the same time; every rank gets the results of all, or the first error."""
        return {key: work() for key, (_, work) in tasks.items()}

    def reduce(self, tensors: Iterable[Tensor], owner: int) -> None:
        """Sum each tensor over the ranks, in place at `owner`. Elsewhere the content is of no use afterwards."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks in place, with the same bits on every rank."""
        return tensor

    def broadcast_window(self, number: int, read: Callable[[int], Tensor]) -> Tensor:
        """Send window `number` of the run from the rank that has it, where `read` finds it under its own count."""
        return read(number)

    def all_reduce_max(self, value: int) -> int:
        """Return the largest value over the ranks."""
        return value

    def barrier(self) -> None:
        """Return once every rank is here: what the others wrote before can be read."""

    def check_equal(self, described: Mapping[str, str]) -> None:
        """Raise InputError that names the rank, on every rank, if one describes itself otherwise than the first."""


ALONE = Ranks()


def add_numbers(ranks: Ranks, values: Sequence[float], owner: int) -> list[float]:
    """Sum some numbers over the ranks; the sums are right at `owner` only."""
    import torch

    total = torch.tensor(values, dtype=torch.float64)
    ranks.reduce([total], owner)
    return total.tolist()


def deal(costs: Mapping[Key, float], size: int) -> dict[Key, int]:
    """Deal keys to ranks so that the largest sum of costs is small: the costliest first, to the least laden."""
    loads = [0.0] * size
    owners: dict[Key, int] = {}
    for key in sorted(costs, key=lambda key: -costs[key]):
        owners[key] = min(range(size), key=lambda rank: loads[rank])
        loads[owners[key]] += costs[key]
    return owners


def turns(owners: Mapping[Key, int]) -> list[list[Key]]:
    """Split the keys, in their order, into lists of at most one key per rank."""
    found: list[list[Key]] = []
    taken: dict[int, int] = {}
    for key, owner in owners.items():
        turn = taken.get(owner, 0)
        taken[owner] = turn + 1
        if turn == len(found):
            found.append([])
        found[turn].append(key)
    return found


def launched() -> tuple[int, int]:
    """Read (rank, number of ranks) from the environment, as a launcher such as torchrun sets them; (0, 1) without one.

    Raises InputError for an environment that says only half of it.
    """
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        return 0, 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
            where="environment",
            do="start the ranks with torchrun, or unset WORLD_SIZE",
        )
    rank = _number("RANK", 0)
    if not 0 <= rank < size:
        raise InputError("RANK is not one of the ranks", where="environment", got=rank, wanted=f"0 to {size - 1}")
    return rank, size


def ranks_here() -> int:
    """Return how many of the ranks share this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1)) if launched()[1] > 1 else 1


def refuse_ranks(what: str) -> None:
    """Raise InputError if several processes were started for what is one process's work."""
    rank, size = launched()
    if size > 1:
        error = InputError(
            f"{what} is one process's work",
            got=f"{size} ranks",
            wanted="no launcher (WORLD_SIZE unset or 1)",
            do="start it without torchrun; only prune and the resume of a prune share their work",
        )
        error.elsewhere = rank != 0
        raise error


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name} is not a number", where="environment", got=text) from None


def _upward(distance: int, step: int) -> int:
    """Divide and round up; 0 for what lies before the start."""
    return max(0, -(-distance // step))
