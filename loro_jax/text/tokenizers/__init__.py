"""Tokenizers: reading, training, and conversion to Hugging Face's format."""
