"""Stage one on the nodes of a Ray cluster."""
