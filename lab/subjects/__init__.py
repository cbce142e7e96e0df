"""Subjects: the models under study, where their weights come from, and how they are loaded."""
