"""What `tune_moe.py` is made of: the search, the comparison, what is shown."""
