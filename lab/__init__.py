"""Measuring instruments for the insides of neural networks. Imports no pytest."""
