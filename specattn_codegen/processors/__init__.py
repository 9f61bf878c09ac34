"""Which processor kernels are for or run on: limits, ceilings, identity and what it is doing."""
