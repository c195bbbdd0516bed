"""The final evaluation: metrics with intervals, latency, and the cheap classifiers that the student has to beat."""
