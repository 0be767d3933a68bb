"""`fastadapt demo`: adapters trained, compared, asked and served on a small real model."""
