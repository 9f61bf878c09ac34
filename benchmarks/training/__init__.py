"""Trains the byte-level Llamas that the acceptance study decodes with. `python -m benchmarks.training --help`."""
