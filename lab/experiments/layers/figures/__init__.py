"""Figures of the layer experiments, one module each: `figure(records)` and `describe(records)`."""
