"""Parses the command line into a verb's options, with help and one-line errors."""
