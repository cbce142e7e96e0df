"""Low-rank adapters: how ranks are dealt over a model's matrices, and what a trained adapter does to its weights."""
