"""From words on the command line to a verb's options: the parser, its help and its one-line errors."""
