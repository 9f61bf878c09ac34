"""One runner per question; each writes its results as JSON under results/<device>/."""
