"""Triton kernels of fastadapt: tensors in, tensors out. One module a kernel; imports torch and triton only, no autograd."""
