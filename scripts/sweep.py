#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[plots,sweep,vision]"]
# ///
"""A temperature and weights chosen by measurement, on images that nothing is reported on.

    accelerate launch scripts/sweep.py --config recipes/configs/image_classification/digits_resnet_kd.yaml \\
        --space '{"temperature": [1, 2, 4, 8], "kd_weight": [0.3, 0.7, 0.9]}' --seeds 0 1 2

trains the student with every point of the grid and every seed, under one teacher, and compares them on a share of the training images
(--validation_share). A range, '{"temperature": {"low": 1, "high": 16, "log": true}}', with --trials 20 leaves the choice to optuna's TPE.
`sweep.json`, a table, a picture and the lines for a config are the result. The same command again goes on where it was stopped.
"""

import argparse
import sys
from pathlib import Path

import hfdistill
from hfdistill.cli import parse


CONFIG = "recipes/configs/image_classification/digits_resnet_kd.yaml"


def main(command_line):
    parser = argparse.ArgumentParser(
        usage="sweep.py [--FLAG VALUE ...] [FLAGS OF THE RECIPE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=CONFIG, help="YAML of a recipe (default: %(default)s).")
    parser.add_argument("--space", help="JSON, or a YAML file: setting -> values or range (default: temperature and kd_weight).")
    parser.add_argument("--trials", type=int, help="Number of settings, where there is a range.")
    own, flags = parser.parse_known_args(command_line)
    config = Path(own.config)
    recipe = hfdistill.load_recipe(Path(__file__).parents[1] / "recipes" / f"{config.parent.name}.py")
    arguments = parse(recipe.ARGUMENTS, ["--config", own.config, "--output_dir", f"outputs/sweep_{config.stem}", *flags])
    space = hfdistill.DEFAULT_SWEEP if own.space is None else hfdistill.read_space(own.space)
    return hfdistill.run_sweep(recipe.main, *arguments, space, " ".join(["accelerate launch scripts/sweep.py", *command_line]), own.trials)


if __name__ == "__main__":
    main(sys.argv[1:])
