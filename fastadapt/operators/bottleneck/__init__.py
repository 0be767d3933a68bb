"""A bottleneck on a stream of tokens: `reference.bottleneck_reference`."""
