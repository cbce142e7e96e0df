"""Layer programs, the executor that runs many of them at once, and the readouts of their final states."""
