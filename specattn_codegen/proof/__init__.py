"""What a kernel computes is right: the float64 oracle, problems to try, tolerances, verdicts."""
