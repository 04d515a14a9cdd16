"""Experiments with the plugin. Nothing of the plugin imports them."""
