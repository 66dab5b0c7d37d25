"""Foundations without a backend: records, checks, numerics, initializers."""
