"""What a run leaves behind: the table, the metrics file, the model card, the augmentations and the student's folder."""
