"""The adapter form on what a base layer has given: `reference.adapter_update_reference`."""
