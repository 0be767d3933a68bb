"""A linear layer each of whose weights is scaled by itself: `reference.hadamard_linear_reference`."""
