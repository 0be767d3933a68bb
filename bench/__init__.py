"""Benchmarks of fastadapt against PEFT: ``python -m bench NAME --json FILE``."""
