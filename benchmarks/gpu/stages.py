"""The stages of acceptance.py: ``python benchmarks/gpu/stages.py NAME`` runs one of them.

A stage prints its results as lines of JSON with ``what``, ``value`` and what else belongs to them.
"""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / place) for place in ("tests/support", "tests/generation", "tests", "benchmarks")]

# Name: "module:function", in this folder.
STAGES = {
    "machine": "machine:machine",
    "verify": "evaluation:verify",
    "convolutions": "convolutions:main",
    "convolutions-tuned": "convolutions:tuned",
    "bars": "bars:main",
    "evaluator": "evaluators:main",
    "networks": "networks:main",
    "compare": "evaluation:compare",
    "kernels": "adm:kernels",
    "sampling512": "adm:sampling512",
    "workers": "workers:main",
    "sampling": "adm:sampling",
    "extraction": "evaluation:extraction",
    "values": "values:main",
    "neighbours": "bars:neighbours",
    "rates": "machine:rates",
    "rates-tuned": "machine:rates_tuned",
    "sizes": "adm:sizes",
    "training": "adm:training",
}

if __name__ == "__main__":
    pkgutil.resolve_name(STAGES[sys.argv[1]])()
