"""Tool calls in a model's text: how each family of models writes them, read as they come."""
