"""Entry point of a cluster job that is submitted as a script. It runs `myllm-ray train`.

ray job submit --working-dir . -- python jobs/train.py --config configs/sft.yaml run.max_steps=20
"""

from __future__ import annotations

import argparse
import sys

from myllm_ray.cli import main as command_line


def main() -> None:
    """Translates the arguments to those of `myllm-ray train` and runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML or JSON file")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    arguments = parser.parse_intermixed_args()
    sys.argv = [
        "myllm-ray",
        "train",
        arguments.config,
        *arguments.overrides,
        *(["--verbose"] if arguments.verbose else []),
    ]
    command_line()


if __name__ == "__main__":
    main()
