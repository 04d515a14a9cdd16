"""Compares converted models with the originals; see tools/check_parity.py."""
