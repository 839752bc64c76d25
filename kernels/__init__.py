"""The Triton floor: one kernel family a file, no import from the floors above.

The folder stands at the top of the repository and installs as `fmfa_losses.kernels`.
Nothing here is imported before a Triton path is chosen, so that `import fmfa_losses` never imports triton.
"""
