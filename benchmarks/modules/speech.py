"""Speech for calibration: sentences of BoolQ's passages, read aloud by flite (Debian flite), 16 kHz.

Real speech with transcripts is in few packages, and a speech model wants more of it than they have. flite's voices awb,
rms and slt are made of the recordings of CMU ARCTIC, so they are nearer to people than those made by rules.

    python benchmarks/modules/speech.py --data DATA
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

from common import rows

VOICES = ("awb", "rms", "slt")
CLIPS, SENTENCES = 240, (1, 3)
"""Clips that are made, and sentences of one clip."""
_SENTENCE = re.compile(r"[A-Z][a-z]+(?:,? [A-Za-z]+){7,24}\.")
"""No digits, no brackets: what is read aloud is what is written."""


def sentences() -> list[list[str]]:
    """List the plain sentences of each passage that has some."""
    passages = dict.fromkeys(str(row["passage"]) for row in rows("boolq/none"))
    found = [_SENTENCE.findall(passage) for passage in passages]
    return [each for each in found if each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    folder = parser.parse_args().data / "speech"
    folder.mkdir(parents=True, exist_ok=True)
    fewest, most = SENTENCES
    texts = [each[: fewest + number % (most - fewest + 1)] for number, each in enumerate(sentences())][:CLIPS]
    lines = []
    for number, text in enumerate(texts):
        name, voice = f"{number:03d}.wav", VOICES[number % len(VOICES)]
        subprocess.run(["flite", "-voice", voice, "-t", " ".join(text), "-o", folder / name], check=True)
        lines.append(json.dumps({"clip": name, "voice": voice, "text": " ".join(text)}))
    (folder / "transcripts.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
