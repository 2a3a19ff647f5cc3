"""How windows and problems are dealt out, what a launcher's environment says, and who may import torch.distributed."""

from __future__ import annotations

import ast
import itertools
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from structprune.architectures.stock.sampler import draw_tokens, skip_tokens
from structprune.errors import InputError
from structprune.ranks import ALONE, Ranks, add_numbers, deal, launched, ranks_here, refuse_ranks, turns
from structprune.recipe import Recipe

ROOT = Path(__file__).parents[2]


class One(Ranks):
    """One of several, which exchanges nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@given(size=st.integers(1, 9), first=st.integers(0, 40), length=st.integers(0, 40))
def test_each_window_is_one_rank_s(size: int, first: int, length: int) -> None:
    """Those of any stretch follow each other among a rank's own, and no rank has two more than another."""
    found: list[int] = []
    counts: list[int] = []
    for rank in range(size):
        start, stop = One(rank, size).local_range(first, first + length)
        found += [rank + own * size for own in range(start, stop)]
        counts.append(stop - start)
    assert sorted(found) == list(range(first, first + length))
    assert max(counts) - min(counts) <= 1


def test_alone() -> None:
    assert ALONE.local_range(3, 9) == (3, 9)
    assert ALONE.broadcast(lambda: 7) == 7
    assert ALONE.all_gather({"a": (0, lambda: 1), "b": (0, lambda: 2)}) == {"a": 1, "b": 2}
    assert add_numbers(ALONE, [1.5, 2.0], 0) == [1.5, 2.0]


@given(costs=st.lists(st.integers(1, 100), min_size=1, max_size=30), size=st.integers(1, 6))
def test_deal(costs: list[int], size: int) -> None:
    """Never further from the best than 4/3: the bound of Graham (1969) for the costliest first."""
    owners = deal({f"p{number}": float(cost) for number, cost in enumerate(costs)}, size)
    loads = [sum(cost for n, cost in enumerate(costs) if owners[f"p{n}"] == rank) for rank in range(size)]
    ordered = sorted(costs, reverse=True)
    pair = ordered[size - 1] + ordered[size] if len(costs) > size else 0
    least = max(max(costs), sum(costs) / size, pair)
    assert max(loads) <= least * 4 / 3 + max(costs) / 3
    assert set(owners) == {f"p{number}" for number in range(len(costs))}


def test_turns() -> None:
    assert turns({"a": 0, "b": 1, "c": 1, "d": 0, "e": 0}) == [["a", "b"], ["c", "d"], ["e"]]
    # One rank does one thing after the other.
    assert turns({"a": 0, "b": 0}) == [["a"], ["b"]]


def test_labels_do_not_depend_on_who_draws() -> None:
    probabilities = torch.randn(4, 5, 11, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)
    everything = torch.Generator().manual_seed(3)
    drawn = [draw_tokens(part, everything) for part in probabilities]
    second = torch.Generator().manual_seed(3)
    for number, part in enumerate(probabilities):
        if number % 2:
            assert torch.equal(draw_tokens(part, second), drawn[number])
        else:
            skip_tokens(len(part), second)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is not a number; got two"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "got 2, wanted 0 to 1"),
    ],
)
def test_environment_that_cannot_be(values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        launched()


def test_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (launched(), ranks_here()) == ((0, 1), 1)
    refuse_ranks("anything")
    environment = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (launched(), ranks_here()) == ((3, 4), 2)
    with pytest.raises(InputError, match="anything is one process's work; got 4 ranks") as caught:
        refuse_ranks("anything")
    assert caught.value.elsewhere


def imports_distributed(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)) if "distributed" in text else []:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if any(f"{module}.{name}".lstrip(".").startswith("torch.distributed") for name in names):
            return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            return True
    return False


def test_only_one_file_knows_torch_distributed() -> None:
    found = [path.name for path in (ROOT / "src").rglob("*.py") if imports_distributed(path)]
    assert found == ["group.py"]


def test_slurm_job() -> None:
    path = ROOT / "examples" / "slurm.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text(encoding="utf-8")
    assert "#SBATCH --nodes=2" in text
    check_command(text.partition("-m structprune ")[2].replace("\\\n", " ").split())


def test_kubernetes_job() -> None:
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    assert f"--nnodes={job['spec']['parallelism']}" in container["args"]
    assert job["spec"]["completionMode"] == "Indexed"
    # The first pod's name, where the launchers meet.
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29500" in container["args"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    check_command(container["args"][container["args"].index("structprune") + 1 :])


def check_command(words: list[str]) -> None:
    """`prune MODEL -o OUT` with settings that exist."""
    assert words[0] == "prune"
    words = [part for word in words[1:] for part in word.split("=", 1)]
    pairs = itertools.pairwise(words)
    given = {name[2:].replace("-", "_"): value for name, value in pairs if name.startswith("--")}
    assert float(given.pop("rank_timeout", "1")) > 0
    assert Recipe.build(**given).method == "structprune"
