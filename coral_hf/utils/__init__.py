"""What every room may use: JSON lines, the machine, releases of Transformers, the code's version, the user's cache.

Knows nothing of targets, drafters or text.
"""
