"""Task-agnostic distillation of a small general student from a pretrained encoder."""
