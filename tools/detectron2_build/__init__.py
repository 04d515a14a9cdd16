"""The pure-Python build of detectron2 v0.5: its patches and its wheel."""
