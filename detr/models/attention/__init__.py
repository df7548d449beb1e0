"""Deformable, dense and conditional attention, and the operator behind the first."""
