"""Choosing: which attention to drop or move and which FFNs to fuse, from what `analysis` measures."""
