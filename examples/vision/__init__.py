"""Parts of `image_classification_vit_moe.py`: data, training that resumes, pictures, tables."""
