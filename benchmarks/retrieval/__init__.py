"""Trains a two-stream model with the objectives of FMFA and retrieves people by description."""
