"""Drafter -> figures: benchmark, verify, tune, step profile, predictions and their plots.

This package runs generation as users do and writes records. It does not depend on training or on the cards.
"""

from .benchmark import run_benchmark


__all__ = ["run_benchmark"]
