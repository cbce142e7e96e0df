"""Figures of the surgery experiments, one module each: `figure(records)` and `describe(records)`."""
