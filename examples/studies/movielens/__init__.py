"""The parts of `movies.py`: reading MovieLens, features, models, the report."""
