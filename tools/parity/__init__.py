"""Compares converted weights with the systems they come from; see tools/check_parity.py."""
