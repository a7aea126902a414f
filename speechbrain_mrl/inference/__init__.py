"""Encoders at work: loading, extraction, stores, optimised forms, search."""
