"""Output formats of a run (uniform, per-layer, sliced, depth), and files for other runtimes made of a checkpoint.

Read first: `uniform.py`, the plain case; then `per_layer.py`; then `export.py`, what an exporter to another runtime
gets and returns.
"""

from structprune.exporters.export import Exporter
from structprune.registry import Registry

EXPORTERS: Registry[Exporter] = Registry(
    "export format",
    Exporter,
    {
        "gguf": "structprune.exporters.gguf.export:GGUF",
        "onnx": "structprune.exporters.onnx_export:ONNX",
        "vllm": "structprune.exporters.vllm_export:VLLM",
    },
    group="structprune.exporters",
)
