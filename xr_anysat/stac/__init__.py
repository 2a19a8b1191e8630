"""Sentinel-2 cubes from STAC catalogs."""
