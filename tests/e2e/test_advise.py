"""`structprune advise`: candidates that remove as much, tried side by side, best first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from structprune.comparison.advice import AdviceRequest, advise, share_of_scope
from structprune.errors import InputError
from structprune.observer import SilentObserver
from structprune.results.comparison import Comparison
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread", "cells_in_this_process")


def request(model: Path, text_file: Path, *candidates: str, **changes: Any) -> AdviceRequest:
    shared = {"calibration": [str(text_file)], "num_samples": 4, "seq_len": 32, "dtype": "float32", "multiple_of": 1}
    return AdviceRequest(
        model=str(model),
        texts=[text_file],
        shared=shared,
        candidates=candidates,
        **{"remove": 0.15, "seq_len": 32, "max_windows": 3, "time_it": False, "quiet": True, **changes},
    )


def test_all_remove_as_much_and_the_least_loss_is_first(text_file: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    asked = request(model, text_file, "random", "fasp", "structprune:scope=all")
    found = advise(asked, tmp_path / "out", SilentObserver())
    assert {entry.label for entry in found.tried} == {"random", "fasp", "structprune:scope=all"}
    # By hand: the same table's perplexities.
    table = Comparison.model_validate_json((tmp_path / "out" / "comparison.json").read_text())
    losses = {cell.label: table.excess(cell)[text_file.name] for cell in table.cells}
    assert [entry.label for entry in found.tried] == sorted(losses, key=lambda label: losses[label])
    for entry in found.tried:
        assert entry.mean_loss == entry.worst_loss == losses[entry.label]
        assert 0.15 <= entry.cell.removed_share_of_model < 0.165
    assert {entry.label: entry.stock for entry in found.tried} == {
        "random": True,
        "fasp": True,
        "structprune:scope=all": False,
    }
    assert found.best_stock is next(entry for entry in found.tried if entry.stock)


def test_what_cannot_remove_so_much_is_left_out(text_file: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    asked = request(model, text_file, "fasp:scope=attention", "fasp", "spap:scope=attention", remove=0.25)
    found = advise(asked, tmp_path / "out", SilentObserver())
    assert [entry.label for entry in found.tried] == ["fasp"]
    assert "is too much of attention" in found.left_out["fasp:scope=attention"]
    assert set(found.left_out) == {"fasp:scope=attention", "spap:scope=attention"}
    with pytest.raises(InputError, match=r"no candidate can remove so much; got --remove 0\.9"):
        advise(request(model, text_file, "fasp", remove=0.9), tmp_path / "none", SilentObserver())
    assert not (tmp_path / "none").exists()


def test_the_share_of_a_scope_is_arithmetic(tmp_path: Path) -> None:
    from structprune.api import inspect

    layout = inspect(save_tiny("llama", tmp_path / "model"))
    mlp = sum(3 * block.group("mlp").num_units * layout.hidden_size for block in layout.blocks)
    assert share_of_scope(layout, "mlp", 0.1) == pytest.approx(0.1 * layout.num_parameters / mlp, abs=1e-4)


def test_the_command_that_it_gives_removes_as_much(
    command_line: Callable[..., tuple[int, str, str]], text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    arguments = ["advise", model, "-o", tmp_path / "out", "--text", text_file, "--calibration", text_file]
    arguments += [
        "--num-samples",
        4,
        "--seq-len",
        32,
        "--remove",
        "15%",
        "--no-speed",
        "--set",
        "dtype=float32",
        "multiple_of=1",
    ]
    arguments += ["--candidates", "fasp", "depth"]
    code, out, err = command_line(*arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {entry["label"]: entry["scope"] for entry in found["tried"]} == {"fasp": "mlp", "depth": "blocks"}
    for entry in found["tried"]:
        words = shlex.split(entry["command"])[1:]
        words[words.index("OUT")] = str(tmp_path / entry["label"])
        code, _, err = command_line(*words, "--num-samples", 4, "--seq-len", 32, "--quiet")
        assert code == 0, err
        report = json.loads((tmp_path / entry["label"] / "pruning_report.json").read_text())
        wanted = entry["cell"]["removed_share_of_model"]
        assert report["size"]["removed_share_of_model"] == pytest.approx(wanted, abs=0.01)
    # The same again goes on: nothing is pruned twice, and the table names the best first.
    code, out, err = command_line(*arguments)
    assert code == 0
    assert "2 of 2 cells" in err
    assert f"take: {found['tried'][0]['command']}" in " ".join(out.split("\n"))


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (30, "--remove is not usable; got 30, wanted a share, at least 0 and less than 1. Did you mean 0.3?"),
        (0, "--remove is a share of the model's parameters; got 0.0, wanted such as 0.2."),
    ],
)
def test_a_share_that_is_none(
    remove: float, message: str, command_line: Callable[..., tuple[int, str, str]], text_file: Path, tmp_path: Path
) -> None:
    code, _, err = command_line("advise", tmp_path, "-o", tmp_path / "out", "--text", text_file, "--remove", remove)
    assert (code, err.strip()) == (2, f"structprune: {message}")
