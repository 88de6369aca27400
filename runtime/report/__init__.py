"""One HTML page to look at a label store."""
