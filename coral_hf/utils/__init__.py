"""Utilities for all packages: JSON lines, the machine, releases of Transformers, the code's version, the user's cache.

They do not depend on targets, drafters or text.
"""
