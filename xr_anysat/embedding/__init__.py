"""From a cube to an embedding cube: options, windows, blocks, forward passes and plans."""
