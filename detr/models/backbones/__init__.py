"""Backbones and the neck that brings their maps to one width."""
