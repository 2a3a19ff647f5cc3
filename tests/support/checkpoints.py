"""Checkpoints with something changed: entries of a JSON file, tensors, code that nobody asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from support.models import save_tiny


def change(path: Path, **entries: Any) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_config(directory: Path, **changes: Any) -> Path:
    """Set entries of config.json; returns the folder."""
    change(directory / "config.json", **changes)
    return directory


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    """Change the tensors of a checkpoint that is one file; returns the folder."""
    path = directory / "model.safetensors"
    save_file(dict(change(load_file(path))), path, metadata={"format": "pt"})
    return directory


def hostile(folder: Path, family: str = "llama") -> tuple[Path, Path]:
    """A model of which every loader could run code, and the file that such code would make."""
    model, marker = save_tiny(family, folder / "model"), folder / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    (model / "evil.py").write_text(code)
    for name in ("custom_generate", "sub"):
        (model / name).mkdir()
        (model / name / "generate.py").write_text(code)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor")
    change(model / "config.json", auto_map=dict.fromkeys(names, "evil.Thing"))
    change(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Thing", "evil.Thing"]},
    )
    (model / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.Thing"}, "size": 3}))
    return model, marker
