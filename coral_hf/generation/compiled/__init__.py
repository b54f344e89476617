"""Drafting and verification as graphs of fixed shapes for `torch.compile`, used by `draft_compile` and static caches."""
