"""Measures an artifact: average precision, latency, and the report that carries both.

Imports without torch.
"""
