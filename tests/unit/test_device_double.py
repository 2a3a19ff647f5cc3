"""The device that the CPU plays: it takes no host tensors, computes as the host, and counts its memory to the byte."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import fake_device
from support.fake_device import FakeDeviceTensor

DEVICE = torch.device("fake", 0)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def at_start() -> int:
    """Bytes that are no business of the test."""
    gc.collect()
    fake_device.reset_peak()
    return fake_device.allocated_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, 4, device="fake"),
        lambda: torch.empty(3, 4, device="fake"),
        lambda: torch.full((3, 4), 2.5, device="fake"),
        lambda: torch.arange(12, device="fake"),
        lambda: torch.eye(4, device="fake"),
        lambda: torch.ones(3, dtype=torch.bool, device="fake"),
        lambda: torch.tensor([[1.0, 2.0]], device="fake"),
        lambda: torch.tensor([], device="fake"),
        lambda: torch.randn(3, device="fake"),
        lambda: torch.randperm(5, device="fake"),
        lambda: torch.zeros_like(torch.ones(3), device="fake"),
        lambda: torch.ones(3).new_zeros(2, device="fake"),
        lambda: torch.ones(3).to("fake").new_full((2,), 1.0),
        lambda: torch.ones(3).to("fake", torch.float64),
    ],
)
def test_tensors_are_made_on_it(make: Callable[[], Tensor]) -> None:
    made = make()
    assert made.device == DEVICE
    assert made.cpu().device.type == "cpu"
    assert made.cpu().shape == made.shape


def test_there_and_back() -> None:
    x = numbers(3, 4)
    there = x.to("fake")
    assert torch.equal(there.cpu(), x)
    there += 1
    assert not torch.equal(there.cpu(), x)
    back = torch.zeros(3, 4, dtype=torch.float64)
    back.copy_(there)
    assert torch.equal(back, x + 1)
    back[:2] = there[1:]
    assert torch.equal(back[:2], (x + 1)[1:])
    there.copy_(x)
    assert there.tolist() == x.tolist()
    assert (float(there[0, 0]), bool(there[0, 0] == x[0, 0].item())) == (float(x[0, 0]), True)
    assert there.new_zeros(2, device="cpu").device.type == "cpu"


MIXED: list[Callable[[Tensor, Tensor], Any]] = [
    lambda there, here: there + here,
    lambda there, here: here @ there,
    lambda there, here: here.add_(there),
    lambda there, here: there.add_(here),
    lambda there, here: there[torch.tensor([0, 2])],
    lambda there, here: there[:, torch.tensor([0, 2])],
    lambda there, here: there[torch.ones(4, dtype=torch.bool)],
    lambda there, here: here[there[0] > 0],
    lambda there, here: there.index_put_((torch.tensor([0]),), there[0]),
    lambda there, here: there.index_select(0, torch.tensor([1])),
    lambda there, here: torch.cat([there, here]),
    lambda there, here: torch.where(here > 0, there, 0.0),
    lambda there, here: torch.mm(there, there, out=here),
    lambda there, here: torch.sum(there, dim=(0, 1), out=torch.zeros((), dtype=torch.float64)),
    lambda there, here: torch.zeros((), dtype=torch.float64).add_(there.sum()),
    lambda there, here: torch.linalg.solve_triangular(here, there, upper=False),
    lambda there, here: torch.equal(there, here),
    lambda there, here: nn.Linear(4, 4, dtype=torch.float64)(there),
    lambda there, here: F.scaled_dot_product_attention(there[None, None], there[None, None], there[None, None], here),
    lambda there, here: F.scaled_dot_product_attention(there[None, None], there[None, None], here[None, None]),
    lambda there, here: there.normal_(generator=torch.Generator().manual_seed(0)),
]


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_mixing_is_refused(number: int) -> None:
    """Also where CUDA would copy an index of the host by itself."""
    here = numbers(4, 4)
    with pytest.raises(RuntimeError, match="host"):
        MIXED[number](here.to("fake"), here.clone())


def test_scalars_of_the_host_are_taken() -> None:
    here = numbers(3)
    scalar = torch.tensor(2.0, dtype=torch.float64)
    assert torch.equal((here.to("fake") * scalar).cpu(), here * scalar)
    there = here.to("fake")
    there[1] = scalar
    assert there[1].item() == 2.0


def test_views_share_their_base() -> None:
    base = torch.zeros(4, 4, device="fake")
    base[1:3, ::2] += 1
    base.T[0] = 7
    base.view(-1)[5:7].copy_(torch.tensor([8.0, 9.0]))
    base.diagonal().mul_(2)
    rows = torch.tensor([3], device="fake")
    base[rows, rows] = 5
    base[base == 9] = -1
    here = torch.zeros(4, 4)
    here[1:3, ::2] += 1
    here.T[0] = 7
    here.view(-1)[5:7] = torch.tensor([8.0, 9.0])
    here.diagonal().mul_(2)
    here[3, 3] = 5
    here[here == 9] = -1
    assert torch.equal(base.cpu(), here)


def test_in_place_and_out_return_what_was_given() -> None:
    x, y = (numbers(4, 4, seed=seed).to("fake") for seed in (0, 1))
    assert x.add_(1) is x
    assert torch.mm(y, y, out=x) is x
    view = x[:, :3]
    assert torch.addmm(view, y, y[:, :3], out=view) is view
    here = numbers(4, 4, seed=1)
    assert torch.equal(x[:, :3].cpu(), torch.addmm((here @ here)[:, :3], here, here[:, :3]))
    grown = torch.empty(0, dtype=torch.float64, device="fake")
    assert torch.mm(y, y, out=grown) is grown
    assert torch.equal(grown, y @ y)
    x.t_()
    assert x.stride() == (1, 4)
    assert torch.equal(x.T.contiguous()[:, 3], (y @ y)[:, 3])


def test_linear_algebra_in_place() -> None:
    def run(x: Tensor) -> list[Tensor]:
        gram = x.T @ x + torch.eye(5, dtype=x.dtype, device=x.device)
        factor = gram.clone().T
        info = torch.empty((), dtype=torch.int32, device=x.device)
        found = torch.linalg.cholesky_ex(factor, out=(factor, info))
        assert found[0] is factor
        right = x.clone().T
        assert torch.linalg.solve_triangular(factor, right, upper=False, out=right) is right
        values, vectors = torch.linalg.eigh(gram)
        solution = torch.linalg.solve(gram, x.T)
        inverse = torch.cholesky_inverse(factor)
        torch.cholesky_inverse(factor, out=factor)
        return [right, factor, inverse, info, values, vectors, solution, torch.cholesky_solve(x.T, gram)]

    here = numbers(6, 5)
    for ours, theirs in zip(run(here), run(here.to("fake")), strict=True):
        assert theirs.device == DEVICE
        assert torch.equal(theirs.cpu(), ours)


def test_autograd_and_modules() -> None:
    def run(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 3)).to(device)
        assert all(isinstance(param, nn.Parameter) for param in module.parameters())
        x = numbers(4, 6).float().to(device).requires_grad_()
        output = module(x)
        output[:, 0].square().sum().backward()
        # As the engine does.
        weight = module.get_parameter("0.weight")
        weight.data = weight.data * 2
        with torch.no_grad():
            doubled = module(x)
        assert module.to("cpu").get_parameter("0.weight").device.type == "cpu"
        gradients = [param.grad for param in module.parameters() if param.grad is not None]
        assert len(gradients) == 6
        assert x.grad is not None
        return [output.detach(), x.grad, doubled, *gradients]

    for ours, theirs in zip(run("cpu"), run("fake"), strict=True):
        assert torch.equal(theirs.cpu(), ours)


def test_random_numbers_are_the_hosts() -> None:
    torch.manual_seed(3)
    here = torch.randn(5)
    torch.manual_seed(3)
    with torch.random.fork_rng(), torch.random.fork_rng(devices=[0], device_type="fake"):
        torch.randn(7, device="fake")
    assert torch.equal(torch.randn(5, device="fake").cpu(), here)


def test_inference_mode() -> None:
    x = torch.ones(3, 3, device="fake")
    with torch.inference_mode():
        y = x[0] + 1
        y[1:] += 1
        x[1] = y
    x += 1
    assert x[1].tolist() == [3.0, 4.0, 4.0]


def test_bytes_of_views_and_of_what_is_written_in_place(at_start: int) -> None:
    def used() -> int:
        return fake_device.allocated_bytes() - at_start

    x = torch.zeros(10, 10, dtype=torch.float64, device="fake")
    assert used() == 800
    view = x[2:4].T
    same = x.data
    parts = x.chunk(5)
    assert used() == 800
    x += 1
    torch.mul(x, 2, out=x)
    x[1] = 0
    assert used() == 800
    del x, same, parts
    assert used() == 800
    del view
    assert used() == 0


def test_bytes_of_results_and_peak(at_start: int) -> None:
    x = torch.zeros(100, dtype=torch.float32, device="fake")
    fake_device.reset_peak()
    # 400 bytes of x, of x + 1 and of the square.
    total = (x + 1).square().sum()
    assert fake_device.peak_bytes() - at_start == 1200
    assert fake_device.allocated_bytes() - at_start == 404
    narrow = x.to(torch.bfloat16)
    assert fake_device.allocated_bytes() - at_start == 604
    grown = torch.empty(0, device="fake")
    torch.add(x, x, out=grown)
    assert fake_device.allocated_bytes() - at_start == 1004
    x.cpu().add(1)
    x.data = narrow.float()
    assert fake_device.allocated_bytes() - at_start == 1004
    with pytest.raises(RuntimeError, match="host"):
        x.add_(torch.ones(100))
    del x, total, narrow, grown
    assert fake_device.allocated_bytes() == at_start


def test_bytes_that_autograd_holds(at_start: int) -> None:
    weight = torch.ones(10, 10, device="fake", requires_grad=True)
    x = torch.ones(10, 10, device="fake")
    output = (x @ weight).sigmoid()
    del x
    # The input and the output are held for the backward pass; the product between them is not.
    assert fake_device.allocated_bytes() - at_start == 3 * 400
    output.sum().backward()
    del output
    assert fake_device.allocated_bytes() - at_start == 2 * 400
    weight.grad = None
    assert fake_device.allocated_bytes() - at_start == 400


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "grouped"])
def test_attention_holds_no_scores(mask: str, at_start: int) -> None:
    """As much as the output and one number per query; a mask is what it is. Its gradients are the host's."""
    num_tokens, heads = 256, 2
    here = numbers(1, heads, num_tokens, 8).float()
    given: dict[str, Any] = {}
    if mask == "causal":
        given["is_causal"] = True
    elif mask == "grouped":
        given["enable_gqa"] = True
    elif mask != "none":
        given["attn_mask"] = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        if mask == "float":
            given["attn_mask"] = torch.zeros(num_tokens, num_tokens).masked_fill(~given["attn_mask"], -torch.inf)
    found: list[list[Tensor]] = []
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention
    for device in ("cpu", "fake"):
        query = here.to(device, copy=True).requires_grad_()
        key = (here[:, :1] if mask == "grouped" else here).to(device, copy=True).requires_grad_()
        held = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
        before = fake_device.allocated_bytes()
        fake_device.reset_peak()
        output = attention(query, key, key, **held)
        if device == "fake":
            scores = heads * num_tokens * num_tokens * 4
            used = output.numel() * 4 + heads * num_tokens * 4
            if mask == "bool":
                # It is made one of numbers first, from its negation, as on CUDA.
                used = num_tokens * num_tokens * 5
            assert fake_device.peak_bytes() - before == used < scores
        (output * output.detach()).sum().backward()
        assert query.grad is not None
        assert key.grad is not None
        found.append([output.detach().cpu(), query.grad.cpu(), key.grad.cpu()])
        with torch.inference_mode():
            again = attention(query, key, key, **held)
        assert torch.equal(again.cpu(), found[-1][0])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(theirs, ours)


def test_other_tests_see_nothing_of_it() -> None:
    """Registered, and not used unless it is asked for by name."""
    assert type(torch.zeros(2)) is Tensor
    assert torch.get_default_device().type == "cpu"
    assert not torch.cuda.is_available()
    assert isinstance(torch.zeros(2, device="fake"), FakeDeviceTensor)
