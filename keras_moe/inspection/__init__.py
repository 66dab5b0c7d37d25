"""Finding, recording and judging what the mixtures of a model do."""
