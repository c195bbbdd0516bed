"""What every folder uses and nothing of which knows of texts or models: errors, files, cache, cards, progress."""
