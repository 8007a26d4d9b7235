"""`myllm-ray verify`: checks that a config trains the same run on every backend and for every split of its batch."""
