"""The paged KV cache, and other engines' caches as views."""
