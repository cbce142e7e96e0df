"""Figures of the architecture experiments, one module each: `figure(records)` and `describe(records)`."""
