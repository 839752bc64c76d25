"""The device under measurement. A dry run (`stand_in_cuda.install`) makes it the CPU."""

NAME = "cuda"
