"""The device under measurement. A dry run (`stand_in_cuda.install`) puts the CPU in its place."""

NAME = "cuda"
