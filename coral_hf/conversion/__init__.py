"""EAGLE-family checkpoints in, checkpoints for serving engines out.

This package does not depend on generation or training. It reads drafters, a target's embedding and head, and the engines'
published schemas.
"""

from .eagle_import import load_eagle
from .engine_export import ENGINES, EngineExport, export_drafter
from .gguf_export import export_gguf


__all__ = ["ENGINES", "EngineExport", "export_drafter", "export_gguf", "load_eagle"]
