"""The operators: one folder each, what they share beside them."""
