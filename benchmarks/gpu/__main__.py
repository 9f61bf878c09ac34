"""`python -m benchmarks.gpu`: runs the campaign, or makes the bundle of wheels it needs where there is no network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu import bundle, campaign, summary
from benchmarks.gpu.campaign import STAGES, Asked
from benchmarks.gpu.journal import ARCHIVE
from specattn_codegen.errors import SpecError

ABOUT = f"""Asks the GPU of this machine everything this project wants to know of one, by priority: its ceilings,
whether every kernel is right, whether a whole round fits one CUDA graph, which plans are fastest, how far off the cost
model is, how peers do, and what a round of Llama 3 8B takes.

Nothing is asked twice: run it again with the same --out, or on another machine with --resume {ARCHIVE}, and it goes on.
Every answer is written as it comes, and all of them are packed in one archive after every stage.
"""
EXAMPLES = """examples:
  python -m benchmarks.gpu --out results --minutes 9
  python -m benchmarks.gpu --out more --minutes 9 --resume results/results.tar.gz
  python -m benchmarks.gpu --out rehearsal --minutes 5 --rehearse
  python -m benchmarks.gpu bundle --out wheels
  python -m benchmarks.gpu.report --from results/results.tar.gz
"""


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=ABOUT, epilog=EXAMPLES, formatter_class=plain
    )
    parser.add_argument("command", nargs="?", choices=("run", "bundle"), default="run", help="run, or make wheels")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, or for the wheels")
    parser.add_argument("--minutes", type=float, default=9.0, help="wall time for everything  [default: 9]")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of the stages, in this order  [default: all]")
    parser.add_argument("--resume", type=Path, metavar=ARCHIVE, help="go on from an archive")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes, labelled as not a GPU's")
    parser.add_argument("--peers", action="store_true", help="bundle: FlashInfer's wheels too")
    return parser


def main() -> int:
    asked = _parser().parse_args()
    try:
        if asked.command == "bundle":
            print(bundle.make(asked.out, with_peers=asked.peers))
            return 0
        finished = campaign.run(
            Asked(
                out=asked.out,
                minutes=asked.minutes,
                stages=asked.stages.split(","),
                resume=asked.resume,
                is_rehearsal=asked.rehearse,
            )
        )
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary.text(asked.out))
    print("every step is settled" if finished else "time is up; the same command goes on from here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
