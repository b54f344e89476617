"""A training as a process: checkpoints, devices, faults, adapters, stages, publishing.

Knows nothing of what is optimised.
"""
