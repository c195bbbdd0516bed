"""Chooses which augmented candidates the student learns from: a reinforced policy or a rule."""
