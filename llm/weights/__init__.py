"""A model's folder: which one, where it comes from, and whether it is whole."""
