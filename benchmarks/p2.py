"""Protocol P2: methods side by side on SmolLM2-135M, calibrated on five domains, tested on those and on an unseen one.

Calibration: WikiText-2 (the first 250,000 characters of the training text), arXiv, web, code and forum, in equal
shares, 60 windows of 1024 tokens in all (seed 0). Tests: the first 8 windows of 1024 tokens of WikiText-2's validation
text, of each domain's other documents, and of the reference manual that comes with the interpreter
(pydoc_data.topics), which no run is calibrated on. No special tokens. The score of a text is its log excess, the
logarithm of its perplexity over the dense model's: the mean and the worst of the five domains, and the unseen one.

    python benchmarks/p2.py -o out/p2 --methods structprune fasp [--sparsities 0.3] [options of structprune compare]

With --weights 2,1,1,1,1 the domains have other shares, in the order above.

The texts lie under STRUCTPRUNE_TEST_DATA (default: the data beside the checkout). Run again, it goes on.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from structprune.cli import main
from structprune.cli.tables import Column, print_table
from structprune.results.comparison import RESULT_NAME, Comparison

ROOT = Path(__file__).parents[1]
DOMAINS = ("arxiv", "web", "code", "forum")
UNSEEN = "manual"
CHARACTERS = 250_000


def summary(found: dict[str, float]) -> tuple[float, float, float]:
    """Return the mean and the worst of the domains that were calibrated on, and the unseen one."""
    seen = [value for label, value in found.items() if Path(label).stem != UNSEEN]
    (unseen,) = (value for label, value in found.items() if Path(label).stem == UNSEEN)
    return sum(seen) / len(seen), max(seen), unseen


def run(arguments: list[str]) -> None:
    """Run `structprune compare` with the protocol's texts and windows, `arguments` after them, and print the scores."""
    weights = ["1"] * (1 + len(DOMAINS))
    if "--weights" in arguments:
        place = arguments.index("--weights")
        weights = arguments[place + 1].split(",")
        arguments = [*arguments[:place], *arguments[place + 2 :]]
    data = Path(os.environ.get("STRUCTPRUNE_TEST_DATA", ROOT.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as folder:
        train, valid, manual = (Path(folder) / f"{name}.txt" for name in ("wikitext2-train", "wikitext2", UNSEEN))
        text = (data / "wikitext2" / "train-1mb.raw.txt").read_text(encoding="utf-8")
        train.write_text(text[:CHARACTERS], encoding="utf-8")
        valid.write_bytes((data / "wikitext2" / "valid.raw.txt").read_bytes())
        manual.write_text("\n\n".join(text for _, text in sorted(topics.items())), encoding="utf-8")
        domains = data / "domains"
        calibration = [train, *(domains / f"{name}-train.jsonl" for name in DOMAINS)]
        tests = [valid, *(domains / f"{name}-test.jsonl" for name in DOMAINS), manual]
        protocol = ["--recipe", str(ROOT / "recipes" / "smollm2-p2.yaml"), "--max-windows", "8"]
        for path, weight in zip(calibration, weights, strict=True):
            protocol += ["--calibration", f"{path}:{weight}"]
        try:
            main(["compare", "smollm2", *protocol, "--text", *map(str, tests), *arguments])
        except SystemExit as done:
            if done.code:
                raise
    output = Path(arguments[arguments.index("-o") + 1])
    comparison = Comparison.model_validate_json((output / RESULT_NAME).read_text(encoding="utf-8"))
    print_scores(comparison)


def print_scores(comparison: Comparison) -> None:
    """Print a row of scores for each method and share."""
    assert comparison.dense is not None
    labels = [Path(text.text).stem.removesuffix("-test") for text in comparison.dense.texts]
    rows: list[tuple[str, ...]] = []
    for cell in comparison.cells:
        found = comparison.excess(cell)
        scores = (*summary(found), *found.values())
        rows.append((cell.label, f"{cell.sparsity:g}", *(f"{score:.3f}" for score in scores)))
    header = [Column(name=name) for name in ("method", "share", "mean", "worst", "unseen", *labels)]
    print_table("log excess of the perplexity", header, rows)


if __name__ == "__main__":
    run(sys.argv[1:])
