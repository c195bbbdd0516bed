"""Chooses which augmented candidates the student learns from, by a trained policy or a rule."""
