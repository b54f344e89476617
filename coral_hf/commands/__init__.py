"""The verbs of the command line, one module each: a dataclass of options with a `run`.

Each reads options, calls a room and reports; it knows no method of its own, and imports its room when it runs.
"""
