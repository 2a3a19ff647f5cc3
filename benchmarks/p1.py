"""Protocol P1: methods side by side on SmolLM2-135M, calibrated on WikiText-2, tested on it and on another domain.

Calibration: 48 windows of 1024 tokens drawn without replacement (seed 0) from the tokenised training text cut into
consecutive windows. Tests: the first 16 consecutive windows of 1024 tokens of the validation text and of the reference
manual that comes with the interpreter (pydoc_data.topics), which no run is calibrated on. No special tokens.

    python benchmarks/p1.py -o out/p1 --methods structprune fasp [--sparsities 0.3] [options of structprune compare]

The texts lie under STRUCTPRUNE_TEST_DATA (default: the data beside the checkout). Run again, it goes on.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from structprune.cli import main

ROOT = Path(__file__).parents[1]


def run(arguments: list[str]) -> None:
    """`structprune compare` with the protocol's texts and windows; `arguments` come after."""
    data = Path(os.environ.get("STRUCTPRUNE_TEST_DATA", ROOT.parent / "shared" / "data")) / "wikitext2"
    with tempfile.TemporaryDirectory() as folder:
        train, valid, manual = (Path(folder) / f"{name}.txt" for name in ("wikitext2-train", "wikitext2", "manual"))
        shutil.copyfile(data / "train-1mb.raw.txt", train)
        shutil.copyfile(data / "valid.raw.txt", valid)
        manual.write_text("\n\n".join(text for _, text in sorted(topics.items())), encoding="utf-8")
        protocol = ["--recipe", str(ROOT / "recipes" / "smollm2-p1.yaml"), "--max-windows", "16"]
        texts = ["--calibration", str(train), "--text", str(valid), str(manual)]
        main(["compare", "smollm2", *protocol, *texts, *arguments])


if __name__ == "__main__":
    run(sys.argv[1:])
