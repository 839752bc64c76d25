"""Trains a two-stream model with the objectives of FMFA and retrieves people by description."""

import os

# Before torch is loaded: threads that wait by spinning make steps five to ten times slower as soon as they share their
# cores with anybody; threads that sleep cost a quarter on a machine of one's own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
