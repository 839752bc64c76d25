"""Classes in the form that other packages expect. Each module needs its package; importing fmfa_losses needs none."""
