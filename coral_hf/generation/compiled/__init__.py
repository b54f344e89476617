"""Draft and verify as graphs of fixed shapes, for `torch.compile`: what `draft_compile` and a static cache ask for."""
