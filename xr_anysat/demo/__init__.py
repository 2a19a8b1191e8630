"""A synthetic landscape, the demo that embeds it, and a linear probe."""
