"""Several ranks on torch.distributed: NCCL between GPUs, gloo between CPUs. The only file that imports it.

What is exchanged: sums to one rank (`reduce`), and Python values with tensors in them from one rank to all. Every wait
is polled, so that the end of the run, which another rank may declare at any time (`heartbeat.py`), is noticed in it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from structprune.engine.ranks.heartbeat import BEAT_S, Fault, Heartbeat, prepare
from structprune.errors import InputError, RankError, StructPruneError, first_line
from structprune.ranks import Key, Ranks, Result, Task, launched

PIECE_BYTES = 16 * 2**20
"""Larger tensors go in pieces: what the library adds to memory is two of them, and a wait ends soon."""
# Of a message: its length and, if it fits, all of it.
_FIRST_BYTES = 4096
_SHORTEST_POLL_S, _LONGEST_POLL_S = 2e-5, 2e-3
_HERE, _MISSING = "here", "missing"
# Public, but without a place in the package's own list of names.
_STORES: Any = dist
# Stores that this process keeps, by place: as long as it lives, since the others may come for another run.
_KEPT: dict[str, Any] = {}
_JOINS = itertools.count()


class Group(Ranks):
    """The ranks that a launcher started. `counted`: bytes that were given to the library, by kind of exchange."""

    def __init__(self, rank: int, size: int, heartbeat: Heartbeat, group: Any) -> None:
        self.rank, self.size = rank, size
        self.counted = {"sums": 0, "tensors": 0, "messages": 0}
        self._heartbeat, self._group = heartbeat, group
        self._inside = False
        self.told: Exception | None = None
        """What this rank has told all others, and raised."""

    def broadcast(self, work: Callable[[], Result]) -> Result:
        if self._inside:
            return work()
        return self._share(0, self._attempt(work) if self.is_first else None)

    def all_gather(self, tasks: Mapping[Key, Task[Result]]) -> dict[Key, Result]:
        if self._inside:
            return super().all_gather(tasks)
        own = {key: self._attempt(work) for key, (owner, work) in tasks.items() if owner == self.rank}
        return {key: self._share(owner, own.pop(key, None)) for key, (owner, _) in tasks.items()}

    def reduce(self, tensors: Iterable[Tensor], owner: int) -> None:
        if self._inside:
            return
        for tensor in tensors:
            for part in _parts(tensor):
                buffer = part.contiguous()
                self.counted["sums"] += buffer.nbytes
                self._run(lambda b=buffer: dist.reduce(b, owner, group=self._group, async_op=True))
                if owner == self.rank and buffer.data_ptr() != part.data_ptr():
                    part.copy_(buffer)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self._inside:
            return tensor
        # Not an all-reduce: how that adds up is the library's choice, and may be another one on each rank.
        self.reduce([tensor], 0)
        self._broadcast(tensor, 0, "sums")
        return tensor

    def broadcast_window(self, number: int, read: Callable[[int], Tensor]) -> Tensor:
        if self._inside:
            return read(number)
        owner, place = number % self.size, number // self.size
        return self._share(owner, self._attempt(lambda: read(place)) if owner == self.rank else None)

    def all_reduce_max(self, value: int) -> int:
        if self._inside:
            return value
        found = torch.tensor([value], dtype=torch.int64)
        self._run(lambda: dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group, async_op=True))
        return int(found)

    def barrier(self) -> None:
        self.all_reduce_max(0)

    def check_equal(self, described: Mapping[str, str]) -> None:
        everyone = [
            self._share(rank, (dict(described), None) if rank == self.rank else None) for rank in range(self.size)
        ]
        raise_difference(everyone, self.rank)

    def _attempt(self, work: Callable[[], Any]) -> tuple[Any, Exception | None]:
        self._inside = self._heartbeat.busy = True
        try:
            return work(), None
        except Exception as error:
            return None, error
        finally:
            self._inside = self._heartbeat.busy = False

    def _share(self, owner: int, outcome: tuple[Any, Exception | None] | None) -> Any:
        """Return what `owner` has found, or raise its error, on every rank."""
        if outcome is None:
            value, error = self._receive(owner)
            if error is not None:
                error.elsewhere = True
                raise error
            return value
        value, error = outcome
        told = error
        if error is not None and not isinstance(error, StructPruneError):
            # The others need not know its class.
            told = RankError(f"rank {self.rank} ended with {type(error).__name__}: {first_line(error)}")
        self._send((value, told))
        if error is not None:
            self.told = error
            raise error
        return value

    def _send(self, value: Any) -> None:
        tensors: list[Tensor] = []
        stream = io.BytesIO()
        _Pickler(stream, tensors).dump(value)
        text = stream.getvalue()
        first = torch.zeros(_FIRST_BYTES, dtype=torch.uint8)
        packed = len(text).to_bytes(8, "little") + text
        head = packed[:_FIRST_BYTES]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._broadcast(first, self.rank, "messages")
        if rest := packed[_FIRST_BYTES:]:
            self._broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8), self.rank, "messages")
        for tensor in tensors:
            self._broadcast(tensor, self.rank, "tensors")

    def _receive(self, owner: int) -> Any:
        first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
        self._broadcast(first, owner, "messages")
        packed = first.numpy().tobytes()
        missing = int.from_bytes(packed[:8], "little") + 8 - _FIRST_BYTES
        if missing > 0:
            rest = torch.empty(missing, dtype=torch.uint8)
            self._broadcast(rest, owner, "messages")
            packed += rest.numpy().tobytes()
        unpickler = _Unpickler(io.BytesIO(packed[8:]))
        value = unpickler.load()
        for tensor in unpickler.tensors:
            self._broadcast(tensor, owner, "tensors")
        return value

    def _broadcast(self, tensor: Tensor, owner: int, kind: str) -> None:
        """Send `tensor`, which is contiguous, from `owner` to all ranks in pieces."""
        for part in _parts(tensor):
            self.counted[kind] += part.nbytes
            self._run(lambda p=part: dist.broadcast(p, owner, group=self._group, async_op=True))

    def _run(self, start: Callable[[], Any]) -> None:
        """Start an exchange and wait for its end. Raises RankError if the run is to end."""
        self._heartbeat.check()
        self._heartbeat.enter()
        try:
            work = start()
            poll_s = _SHORTEST_POLL_S
            while not work.is_completed():
                self._heartbeat.check()
                time.sleep(poll_s)
                poll_s = min(2 * poll_s, _LONGEST_POLL_S)
            work.wait()
        except RuntimeError as error:
            fault = self._heartbeat.lost(self._heartbeat.silence_s)
            text = f"the connection between the ranks broke ({first_line(error)})"
            raise (fault or Fault(culprit=None, text=text)).error() from error
        finally:
            self._heartbeat.leave()


@contextlib.contextmanager
def joined(timeout_s: float) -> Generator[Group]:
    """Join the ranks that the environment names, all of them present and of the same versions.

    Nobody is waited for longer than `timeout_s`. A rank whose body raises ends the run everywhere; one that is
    interrupted because another died says so. Raises RankError, and InputError for another version.
    """
    rank, size = launched()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun keeps the store in its own process.
    kept_outside = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = f"{host}:{port} ({'the launcher' if kept_outside else 'rank 0'})"

    # What was left under the same address by an attempt before this one, or by a run before this one, is not ours.
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    prefix = f"structprune/{attempt}/{next(_JOINS)}"
    limit = timedelta(seconds=timeout_s)
    try:
        if rank == 0 and not kept_outside and place not in _KEPT:
            _KEPT[place] = _STORES.TCPStore(host, port, is_master=True, timeout=limit, wait_for_workers=False)
        # One for this thread and one for the watch's.
        store, watched = (
            _STORES.PrefixStore(prefix, _STORES.TCPStore(host, port, timeout=limit, wait_for_workers=False))
            for _ in range(2)
        )
    except RuntimeError as error:
        raise _unreachable(place, error) from error
    heartbeat = Heartbeat(watched, place, rank, size, timeout_s)
    if rank == 0:
        prepare(store)
    heartbeat.first_sign()
    _meet(store, place, rank, size, timeout_s)
    heartbeat.start()
    ranks: Group | None = None
    try:
        group = _connect(store, rank, size, timeout_s)
        ranks = Group(rank, size, heartbeat, group)
        yield ranks
        ranks.barrier()
        # The one that keeps the store stays until all have left.
        store.set(f"left/{rank}", "")
        heartbeat.stop()
        if rank == 0:
            with contextlib.suppress(RuntimeError):
                store.wait([f"left/{r}" for r in range(size)], timedelta(seconds=timeout_s))
        dist.destroy_process_group(group)
    except KeyboardInterrupt:
        # A launcher interrupts all that are left when one dies.
        fault = heartbeat.interrupted()
        if fault is None:
            heartbeat.report("was interrupted")
            raise
        raise fault.error() from None
    except BaseException as error:
        # A fault that this rank has found is told by its heartbeat.
        if not getattr(error, "elsewhere", False) and (ranks is None or error is not ranks.told):
            heartbeat.report(f"ended with {type(error).__name__}: {first_line(error)}")
        raise
    finally:
        heartbeat.end()


def _connect(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """Connect to the library's group of all ranks; None: its default one. Raises RankError."""
    backend = _use_device()
    # The watch is to find what is wrong first.
    limit = timedelta(seconds=2 * timeout_s + 60)
    try:
        if dist.is_initialized():
            return dist.new_group(backend=backend, timeout=limit)
        dist.init_process_group(
            backend, store=_STORES.PrefixStore("group", store), rank=rank, world_size=size, timeout=limit
        )
    except RuntimeError as error:
        raise RankError(
            f"rank {rank} cannot be connected with the others",
            where="shared run",
            got=first_line(error),
            do="name the network card in GLOO_SOCKET_IFNAME, and let the machines reach each other on all ports",
        ) from error


def _use_device() -> str:
    """Choose the backend by the devices; each rank of a machine takes a GPU of its own."""
    if not torch.cuda.is_available():
        return "gloo"
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise InputError(
            "there are more ranks than GPUs on this machine",
            got=f"local rank {number}",
            wanted=f"at most {torch.cuda.device_count()} ranks",
            do="lower --nproc-per-node",
        )
    torch.cuda.set_device(number)
    return "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"


def _meet(store: Any, place: str, rank: int, size: int, timeout_s: float) -> None:
    """Return once every rank is there. Raises RankError that names the missing ones."""
    deadline = time.monotonic() + timeout_s
    missing = [str(r) for r in range(size)]
    try:
        store.set(f"{_HERE}/{rank}", "")
        while missing:
            missing = [r for r in missing if not store.check([f"{_HERE}/{r}"])]
            if missing and store.check([_MISSING]):
                raise _not_come(store.get(_MISSING).decode(), size, timeout_s)
            if missing and time.monotonic() > deadline:
                store.set(_MISSING, ", ".join(missing))
                # The others hear it before the store goes with the process that keeps it.
                time.sleep(2 * BEAT_S)
                raise _not_come(", ".join(missing), size, timeout_s)
            time.sleep(0.02)
    except RuntimeError as error:
        raise _unreachable(place, error) from error


def _not_come(missing: str, size: int, timeout_s: float) -> RankError:
    return RankError(
        f"rank {missing} of {size} did not come within {timeout_s:g} s",
        where="shared run",
        do="look at what it printed; raise --rank-timeout if it only starts slowly",
    )


def _unreachable(place: str, error: BaseException) -> RankError:
    return RankError(
        "the store of the ranks cannot be reached",
        where=place,
        got=first_line(error),
        do="check MASTER_ADDR and MASTER_PORT, and that rank 0's machine can be reached",
    )


def raise_difference(everyone: list[dict[str, str]], rank: int) -> None:
    """Raise InputError for the first rank that describes itself otherwise than rank 0. `rank` is who asks."""
    first = everyone[0]
    for other, described in enumerate(everyone):
        for name, value in described.items():
            if value != first[name]:
                error = InputError(
                    f"rank {other} has another {name} than rank 0",
                    where="shared run",
                    got=value,
                    wanted=first[name],
                    do="start all ranks with the same command on the same files and versions",
                )
                error.elsewhere = rank != 0
                raise error


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of at most `PIECE_BYTES`, or of one row; none of an empty tensor."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield from tensor.detach().view(-1).split(max(1, PIECE_BYTES // tensor.itemsize))
    else:
        row_bytes = max(1, tensor.nbytes // len(tensor))
        yield from tensor.detach().split(max(1, PIECE_BYTES // row_bytes))


class _Pickler(pickle.Pickler):
    """Leaves the tensors out: they are sent as they lie in memory."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        self._tensors.append(obj.detach().contiguous())
        return tuple(obj.shape), obj.dtype, obj.device.type


class _Unpickler(pickle.Unpickler):
    """Makes room for the tensors, in the order in which they come."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.tensors: list[Tensor] = []

    def persistent_load(self, pid: Any) -> Tensor:
        shape, dtype, device = pid
        self.tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return self.tensors[-1]
