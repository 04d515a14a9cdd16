"""Benchmarks of WS: time and memory of the operation and of whole detectors, interleaved."""
