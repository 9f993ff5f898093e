"""Tokenizers: read, trained, and converted to and from Hugging Face's format."""
