"""Prompt lookup: continuations of earlier occurrences of the text's last tokens, as nodes of a draft tree."""
