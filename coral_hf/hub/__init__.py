"""Drafter -> Hub: its card, the files of a published folder, and pushing."""
