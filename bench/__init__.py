"""Measures an artefact: average precision, latency, and the report that carries both.

Imports without torch.
"""
