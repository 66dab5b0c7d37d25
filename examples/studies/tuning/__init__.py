"""What `tune.py` is made of: the search, the comparison, what is shown."""
