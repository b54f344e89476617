"""Drafter -> numbers: benchmark, verify, tune, step profile, predictions and their plots.

Runs generation as users do and writes records; knows nothing of training, and nothing of the cards made from records.
"""

from .benchmark import run_benchmark


__all__ = ["run_benchmark"]
