"""The verbs of the command line, one module each: a dataclass of options with a `run`.

A verb reads options, calls another package and reports. It implements no method itself and imports that package when it runs.
"""
