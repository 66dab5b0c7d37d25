"""Measurements of a case: time, memory, or the time to compile."""
