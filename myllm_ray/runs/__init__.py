"""Runs on disk: lists of runs, the differences of two runs, and the explanation of a difference. Needs no Ray."""
