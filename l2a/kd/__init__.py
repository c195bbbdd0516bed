"""Knowledge distillation: losses, mixtures of data and the training loop."""
