"""`fastadapt train`: an adapter from a file of data, with exact resume."""
