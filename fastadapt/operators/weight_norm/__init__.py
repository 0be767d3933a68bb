"""DoRA's row norms: `reference.weight_norm_reference`."""
