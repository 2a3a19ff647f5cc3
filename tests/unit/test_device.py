"""The budget of a CUDA device: no device is needed to see that it is set, kept and given back."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from structprune.engine.planning.plan import DevicePlan
from structprune.engine.run.device import DeviceMeter, device_budget
from structprune.errors import InputError, MemoryBudgetError
from structprune.phases import Phase
from support.fake_gpu import GIB, FakeGpu

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Generator[FakeGpu]:
    fake = FakeGpu()
    with monkeypatch.context() as patch:
        fake.install(patch)
        yield fake


def plan(budget: int) -> DevicePlan:
    return DevicePlan(budget_bytes=budget, phases={Phase.PROPAGATE: budget // 2}, sums="device", solves="device")


def test_by_default_most_of_what_is_free(gpu: FakeGpu) -> None:
    assert device_budget(CUDA, None) == 12 * GIB * 9 // 10
    assert device_budget(CUDA, 3 * GIB) == 3 * GIB
    assert device_budget(torch.device("cpu"), None) is None


def test_a_cpu_has_no_budget_of_its_own() -> None:
    with pytest.raises(InputError, match=r"the budget of a CUDA device; got 2.0 GiB with --device cpu, wanted"):
        device_budget(torch.device("cpu"), 2 * GIB)


def test_the_limit_is_the_budget_beside_what_was_there(gpu: FakeGpu) -> None:
    with DeviceMeter(device=CUDA, plan=plan(3 * GIB)) as meter:
        assert gpu.fractions == [4 / 16]
        gpu.peak = 2 * GIB
        assert meter.peak_bytes() == 2 * GIB - GIB // 2
    assert gpu.fractions == [4 / 16, 1.0]


def test_more_than_there_is_is_no_limit(gpu: FakeGpu) -> None:
    with DeviceMeter(device=CUDA, plan=plan(40 * GIB)):
        assert gpu.fractions == [1.0]


def test_a_limit_that_is_reached_ends_in_one_clear_error(gpu: FakeGpu) -> None:
    with (
        pytest.raises(MemoryBudgetError, match=r"memory budget was reached.*got 3.0 GiB, wanted 1.5 GiB by the plan"),
        DeviceMeter(device=CUDA, plan=plan(3 * GIB)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert gpu.fractions[-1] == 1.0


def test_other_errors_pass(gpu: FakeGpu) -> None:
    with pytest.raises(KeyboardInterrupt), DeviceMeter(device=CUDA, plan=plan(3 * GIB)):
        raise KeyboardInterrupt
    assert gpu.fractions[-1] == 1.0


def test_without_a_device_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("CUDA was asked")

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", never)
    with DeviceMeter() as meter:
        assert meter.peak_bytes() == 0
