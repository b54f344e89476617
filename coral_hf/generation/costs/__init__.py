"""What a step costs on this machine, and whether drafting pays for it: measured, kept in files, read between what was measured."""
