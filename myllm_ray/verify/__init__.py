"""`myllm-ray verify`: does this config train the same run wherever its tensors live and however its batch is cut?"""
