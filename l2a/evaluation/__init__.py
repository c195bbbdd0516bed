"""The final evaluation: metrics with intervals, latency, and simple classifiers for comparison."""
