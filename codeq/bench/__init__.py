"""Measures a running server through the public client and REST."""
