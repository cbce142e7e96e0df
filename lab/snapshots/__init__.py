"""Snapshots: the committed numbers and verdicts; where they lie, how they read, and what moved between two."""
