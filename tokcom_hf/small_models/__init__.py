"""Builds and trains the small Llama, LLaVA and InternVL of the offline examples."""
