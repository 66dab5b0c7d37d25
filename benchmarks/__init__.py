"""Cost of a mixture of experts, as a multiple of a dense layer that does the same work."""
