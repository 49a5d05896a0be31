"""A capture on disk: its graph, its guards, and what it is bound to."""
