"""Hostile input, guided by the code that it reaches."""
