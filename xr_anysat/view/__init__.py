"""Pictures of frames and embeddings, in matplotlib and in Jupyter."""
