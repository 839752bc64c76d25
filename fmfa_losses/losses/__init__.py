"""The objectives without parameters, one concept per file."""
