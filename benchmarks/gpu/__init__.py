"""The GPU campaign: everything a GPU has to say, asked in one prepared run. `python -m benchmarks.gpu --help`.

It runs from a checkout that is not installed, whose folders therefore go on the path here, before anything else.
"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT / name) for name in ("", "runtime", "benchmarks") if str(CHECKOUT / name) not in sys.path]
