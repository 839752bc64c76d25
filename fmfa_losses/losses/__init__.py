"""The objectives without parameters, one concept a file."""
