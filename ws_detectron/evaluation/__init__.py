"""What a finished run is worth: COCO figures, comparisons, pictures."""
