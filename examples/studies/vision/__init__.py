"""Parts of `images.py`: data, training that resumes, pictures, tables."""
