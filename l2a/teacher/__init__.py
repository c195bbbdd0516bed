"""The teacher: loading, fine-tuning on source and target, soft labels and their cache."""
