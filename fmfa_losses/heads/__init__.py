"""The objectives with parameters; loading them from a checkpoint; masking the words of a caption."""
