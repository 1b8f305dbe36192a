"""The FX engine: knows graphs, nothing of feed-forward networks."""
