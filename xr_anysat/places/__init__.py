"""Embeddings of places: tables of points and polygons in, tables of embeddings out."""
