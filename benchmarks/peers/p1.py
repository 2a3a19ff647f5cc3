"""Protocol P1 for the peers: each prunes in a process of its own, structprune evaluates; rows as in benchmarks/p1.py.

    .venv/bin/python benchmarks/peers/p1.py --data DIR [--peers torch-pruning:taylor optipfair:data] [--sparsities 0.3]

DIR holds wikitext2/train-1mb.raw.txt and wikitext2/valid.raw.txt. The second text is the interpreter's own manual.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from structprune.api import evaluate

ROOT = Path(__file__).parents[2]
PEERS = ["torch-pruning:taylor", "torch-pruning:magnitude", "optipfair:static", "optipfair:data"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("STRUCTPRUNE_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--peers", nargs="+", default=PEERS, metavar="PEER:IMPORTANCE")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="of the peers' passes; the evaluation chooses its own")
    parser.add_argument("--python", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    parser.add_argument("--output", type=Path, default=Path("out/p1-peers.jsonl"))
    arguments = parser.parse_args()
    train = arguments.data / "wikitext2" / "train-1mb.raw.txt"
    valid = arguments.data / "wikitext2" / "valid.raw.txt"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        manual = Path(folder) / "python-reference.txt"
        manual.write_text("\n\n".join(text for _, text in sorted(topics.items())), encoding="utf-8")
        for sparsity in arguments.sparsities:
            for peer, importance in (entry.split(":", 1) for entry in arguments.peers):
                output = Path(folder) / "out"
                command = [arguments.python, str(Path(__file__).with_name("run.py"))]
                command += ["--peer", peer, "--importance", importance, "--sparsity", str(sparsity)]
                command += ["--model", arguments.model, "--calibration", str(train), "--seq-len", "1024"]
                command += ["--num-samples", str(arguments.num_samples), "--dtype", arguments.dtype, "-o", str(output)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row = {"method": f"{peer} {importance}", "sparsity": sparsity}
                for path in (valid, manual):
                    result = evaluate(output, path, seq_len=1024, max_windows=arguments.windows)
                    row[f"perplexity {path.name}"] = result.perplexity
                facts = json.loads(done.stdout.splitlines()[-1])
                # A temporary directory's name says nothing once it is gone.
                row |= {"windows": arguments.windows, **{k: v for k, v in facts.items() if k != "output"}}
                print(json.dumps(row), flush=True)
                with arguments.output.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(row) + "\n")
                shutil.rmtree(output)


if __name__ == "__main__":
    main()
