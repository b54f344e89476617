"""The verbs of the command line, one module each: a dataclass of options with a `run`."""
