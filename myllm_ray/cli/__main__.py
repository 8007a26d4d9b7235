"""`python -m myllm_ray.cli`."""

import os

from myllm_ray.cli import main

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
