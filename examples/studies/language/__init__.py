"""Parts of `text.py`: text, generation, pictures, tables."""
