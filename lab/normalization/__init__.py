"""Instruments of T-15: the norms of a decoder by their roles, what can take their places, and what they see."""
