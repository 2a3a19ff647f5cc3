"""Output formats of a run (uniform, per-layer, sliced, depth), and files for other runtimes made of a checkpoint."""

from structprune.exporters.export import Exporter
from structprune.registry import Registry

EXPORTERS: Registry[Exporter] = Registry(
    "export format",
    {
        "gguf": "structprune.exporters.gguf.export:export_gguf",
        "onnx": "structprune.exporters.onnx_export:export_onnx",
    },
)
