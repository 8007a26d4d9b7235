"""Runs on Ray. The only package that imports Ray."""

from myllm_ray.orchestration import environment as environment  # before any import of Ray
