"""Embedding cubes in Zarr stores and GeoTIFF files."""
