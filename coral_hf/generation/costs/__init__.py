"""Costs of a step on this machine: measured, cached in files and interpolated. They decide whether drafting pays."""
