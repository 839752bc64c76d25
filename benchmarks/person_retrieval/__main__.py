"""`python -m benchmarks.person_retrieval COMMAND`: the paper's experiments.

On its data sets, or on rendered pedestrians, which need no download.
"""

import importlib
import sys

from .options import invoke

COMMANDS = {
    "train": "one training with all four objectives, and its test",
    "evaluate": "Rank-k, mAP and mINP of a run or of weights; --zero-shot beside the published figures",
    "ablation": "Table 6: InfoNCE, SDM, A-SDM, EFA and all, over seeds",
    "sweep": "Figure 4, Tables 7 and 8: one hyperparameter, over seeds",
    "cross": "train on one data set, test on the others",
    "time": "Table 9: seconds of features and of ranking",
    "compare": "Figures 6-8: what two runs find for the same captions",
    "pretrain": "the weights that rendered pedestrians start from, from rendered pictures in general",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(__doc__, *(f"    {name:9} {what}" for name, what in COMMANDS.items()), sep="\n")
        print("\n    COMMAND --help says more")
        return 0 if argv[:1] in ([], ["--help"], ["-h"]) else 2
    command = importlib.import_module(f"{__package__}.commands.{argv[0]}")
    return invoke(lambda: command.main(argv[1:]))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
