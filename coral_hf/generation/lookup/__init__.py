"""What the text already says: continuations of earlier occurrences of its last tokens, as nodes of a draft tree."""
