"""What everything rests on: records, checks, numerics, initializers, and no backend."""
