"""The parts of `recommend_movies.py`: reading MovieLens, features, models, the report."""
