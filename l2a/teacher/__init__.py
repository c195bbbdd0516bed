"""The teacher: loaded, fine-tuned on the source and the target's few labels, and asked for soft labels."""
