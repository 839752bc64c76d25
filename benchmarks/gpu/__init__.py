"""The prepared run on a CUDA device, and what is made for it without one."""
