"""Checkpoints of the EAGLE family in, checkpoints that serving engines load out."""

from .eagle_import import load_eagle
from .engine_export import ENGINES, EngineExport, export_drafter


__all__ = ["ENGINES", "EngineExport", "export_drafter", "load_eagle"]
