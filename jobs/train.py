"""Entry point of a cluster job:

    ray job submit --working-dir . -- python jobs/train.py --config configs/sft.yaml run.max_steps=20
"""

from __future__ import annotations

import argparse
import sys

from myllm_ray import UserError, train
from myllm_ray.common.logs import show_progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML or JSON file")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    arguments = parser.parse_intermixed_args()
    show_progress()
    try:
        result = train(arguments.config, arguments.overrides, arguments.verbose)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(result.summary())


if __name__ == "__main__":
    main()
