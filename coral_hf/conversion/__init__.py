"""EAGLE-family checkpoints in, checkpoints for serving engines out.

Knows nothing of generation or training: a drafter, a target's ends and the engines' published schemas are all it reads.
"""

from .eagle_import import load_eagle
from .engine_export import ENGINES, EngineExport, export_drafter
from .gguf_export import export_gguf


__all__ = ["ENGINES", "EngineExport", "export_drafter", "export_gguf", "load_eagle"]
