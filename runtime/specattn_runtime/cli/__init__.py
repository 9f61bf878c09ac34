"""Console commands of the runtime."""
