"""The adapter form on linear layers that read one x: `reference.adapter_linear_reference`."""
