"""Self-speculative decoding: the pieces of a round, presets, requests, sessions and the engine."""
