"""Prompts -> the target's own answers, by continuous batching here or by a serving engine's endpoint.

Knows nothing of how a drafter is trained on them.
"""
