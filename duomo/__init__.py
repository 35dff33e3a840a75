"""Duomo's shared library: everything that more than one service uses, and nothing that only one does."""
