"""Prompts -> the target's own answers, by continuous batching on this machine or by a serving engine's endpoint.

This package does not depend on training.
"""
