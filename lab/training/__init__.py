"""Training of specimens: small adapters with a recipe each, made by `python -m lab train NAME` and never by a test."""
