"""Evaluation of trained models: COCO metrics, comparison of runs, visualization."""
