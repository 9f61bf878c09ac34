"""The search for plans: sessions, searches, workers, measurement, records, and bundles for a machine elsewhere."""
