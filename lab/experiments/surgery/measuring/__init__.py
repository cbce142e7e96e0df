"""How experiments measure, where that is too long for the experiment's own module; imports torch."""
