"""Architectures as tables of tensor shapes: what a configuration implies, and what a checkpoint's headers hold."""
