"""Geometry of the charts on the page of results: numbers in, places and paths out. The templates draw them."""
