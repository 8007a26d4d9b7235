"""Runs `myllm-ray ...` on the machine that TEST_CPU and TEST_CORES describe: `python product.py train config.yaml`."""

import machine  # noqa: F401  (patches what Python and torch report about this machine)

from myllm_ray.cli import main

if __name__ == "__main__":
    main()
