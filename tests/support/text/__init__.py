"""Tokenizers and schemas."""
