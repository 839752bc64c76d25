"""Triton kernels, one family per file. Nothing is imported from the layers above.

The folder is at the top of the repository and installs as `fmfa_losses.kernels`.
Nothing here is imported before a Triton path is chosen, so that `import fmfa_losses` never imports triton.
"""
