"""What WS costs: the operation, whole detectors, and memory, measured side by side in one run."""
