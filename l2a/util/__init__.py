"""Helpers that know nothing of texts or models: errors, files, cache, cards, progress, training, clusters."""
