"""Tuned-config packs: what they hold, how files are read, merged and judged, and how one is looked up."""
