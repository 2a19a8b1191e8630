"""Analysis of embedding cubes: components, similarity, clusters, classification and vector data."""
