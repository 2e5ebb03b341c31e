"""What vLLM calls its settings, and what they mean here."""
