"""Many adapters in one batch: `reference.multi_adapter_linear_reference`."""
