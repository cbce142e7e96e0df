"""Texts that experiments read: prompts, completions, minimal pairs, and batches of token ids."""
