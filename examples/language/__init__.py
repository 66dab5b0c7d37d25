"""Parts of `text_switch_transformer.py`: text, generation, pictures, tables."""
