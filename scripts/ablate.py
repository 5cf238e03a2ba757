#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[plots]"]
# ///
"""What each part of a recipe is worth: trains the recipe, then the same with one part left out at a time.

    accelerate launch scripts/ablate.py --ablation recipes/ablations/tinybert.yaml

writes `ablation.json`, a table and a picture to the output folder of the ablation. Further flags go to the recipe. The same
command again goes on where it was stopped.
"""

import sys
from pathlib import Path

import hfdistill
from hfdistill.cli import parse


def main(command_line):
    if len(command_line) < 2 or command_line[0] != "--ablation":
        raise SystemExit(__doc__)
    ablation = hfdistill.load_ablation(command_line[1])
    recipe = hfdistill.load_recipe(Path(__file__).parents[1] / "recipes" / f"{ablation['recipe']}.py")
    arguments = parse(recipe.ARGUMENTS, ["--config", ablation["config"], *command_line[2:]])
    return hfdistill.run_ablation(recipe.main, *arguments, ablation, " ".join(["accelerate launch scripts/ablate.py", *command_line]))


if __name__ == "__main__":
    main(sys.argv[1:])
