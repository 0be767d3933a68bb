"""Triton kernels of fastadapt, one module each: tensors in, tensors out. Imports torch and triton only; no autograd."""
