"""Benchmarks: one question a module, each answered beside its peers and the ceilings of the very same run."""
