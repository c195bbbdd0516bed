"""What a run leaves behind: its table, metrics, model card, candidates and the exported student."""
