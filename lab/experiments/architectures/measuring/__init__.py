"""The reading half of the architecture experiments: configurations and tensor headers of a checkpoint."""
