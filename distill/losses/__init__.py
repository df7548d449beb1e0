"""Matching queries to objects, and the losses over what was matched."""
