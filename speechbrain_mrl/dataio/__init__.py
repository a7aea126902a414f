"""Recordings, their lists, and training data."""
