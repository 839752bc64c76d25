"""The PyTorch path of EFA: tokens [B, T, D] as rows of those that the masks keep, in tasks for threads."""
