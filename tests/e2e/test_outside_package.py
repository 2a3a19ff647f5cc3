"""A package beside structprune adds a method and its parts: the example of docs/extend.md, installed and used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import structprune

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"


def block(language: str) -> str:
    """The page's block of code in this language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return found


def install(directory: Path, entry_points: str, name: str = "loud") -> None:
    """What pip leaves of a package: its module, and a folder that says what it is."""
    (directory / "loud.py").write_text(block("python"), encoding="utf-8")
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")


def structprune_with(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process that finds the package."""
    paths = [str(Path(structprune.__file__).parents[1]), str(directory), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "structprune", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_prunes_with_the_package(tiny_llama: Path, tmp_path: Path) -> None:
    """Its text, its widths, its units, its weights; nothing of ours was told of them."""
    install(tmp_path, block("ini"))
    arguments = ("prune", tiny_llama, "-o", tmp_path / "out", "--method", "loud", "--calibration", "countdown")
    sizes = ("--sparsity", 0.3, "--num-samples", 4, "--seq-len", 32, "--multiple-of", 1, "--no-reload-check")
    done = structprune_with(tmp_path, *arguments, *sizes)
    assert done.returncode == 0, done.stderr
    report = read_json(tmp_path / "out" / "pruning_report.json")
    recipe = report["recipe"]
    assert (report["method"], report["calibration"]["description"]) == ("loud", "a countdown")
    assert (recipe["score"], recipe["allocator"], recipe["solver"]) == ("loudness", "staircase", "rescale")
    # 29 of 96 channels go, twice as many of the second block as of the first.
    assert [entry["kept_units"] for entry in report["blocks"]] == [38, 29]
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = read_json(tmp_path / "out" / "pruning_manifest.json")["kept_indices"]
    for index, entry in enumerate(report["blocks"]):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        cut = before[name][:, kept[str(index)]["mlp"]]
        assert after[name].allclose(entry["statistics"]["factor"] * cut, rtol=1e-5)
        assert entry["statistics"]["factor"] != 1


def test_is_listed(tmp_path: Path) -> None:
    install(tmp_path, block("ini"))
    done = structprune_with(tmp_path, "methods")
    assert done.returncode == 0, done.stderr
    assert "loud" in done.stdout


@pytest.mark.parametrize(
    ("entry_points", "said"),
    {
        "ours": ("[structprune.methods]\nfasp = loud:LOUD\n", "the method 'fasp' is there already"),
        "former": ("[structprune.allocators]\nenergy = loud:STAIRCASE\n", "the allocator 'energy' is there already"),
        "searched": ("[structprune.scores]\ngreedy = loud:LOUDNESS\n", "the score 'greedy' is there already"),
        "absent": ("[structprune.methods]\nquiet = loud:QUIET\n", "the method 'quiet' cannot be imported"),
        "other": ("[structprune.methods]\nquiet = loud:LOUDNESS\n", "the method 'quiet' is none"),
    }.values(),
)
def test_what_is_wrong_with_a_package_is_said(entry_points: str, said: str, tiny_llama: Path, tmp_path: Path) -> None:
    """One error that names the package; ours are never replaced."""
    install(tmp_path, entry_points, name="noise")
    method = "quiet" if "quiet" in entry_points else "wanda-sp"
    done = structprune_with(tmp_path, "plan", tiny_llama, "--method", method, "--seq-len", 32)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "entry point of noise" in done.stderr
    assert "Traceback" not in done.stderr
