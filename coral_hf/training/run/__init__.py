"""The run of a training: checkpoints, devices, faults, adapters, stages, publishing.

This subpackage does not depend on the losses.
"""
