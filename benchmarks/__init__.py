"""What a mixture of experts costs, as a multiple of a dense layer that does the same work."""
