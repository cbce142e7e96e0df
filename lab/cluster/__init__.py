"""Sweeps spread over other processes: work as bytes, the workers that do it, and the sweep that deals it out."""
