"""The adapter form on rows that are sorted by expert: `reference.expert_linear_reference`, `expert_block_reference`."""
