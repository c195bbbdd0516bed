"""The student: presets and checkpoints, initial weights and vocabulary."""
