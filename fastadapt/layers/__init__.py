"""Layers that carry adapters."""
