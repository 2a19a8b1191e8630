"""Sentinel-2 cubes: reading, compositing into frames, and normalization."""
