"""Tiny models of every architecture, real configs, fetched models, oracles."""
