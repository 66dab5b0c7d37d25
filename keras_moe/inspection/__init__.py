"""Search, records and health of the mixtures of a model."""
