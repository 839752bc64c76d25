"""The objectives with parameters, and what they read of a checkpoint or mask of a caption."""
