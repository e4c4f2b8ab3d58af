"""Stage of acceptance.py: features from a Ray worker on the GPU equal those of one process byte for byte."""

from __future__ import annotations

import importlib.util
import json
import time


def main() -> None:
    """Skipped if Ray is not installed, before anything else is loaded."""
    if importlib.util.find_spec("ray") is None:
        print(json.dumps({"what": "Ray", "value": "not installed, not measured"}), flush=True)
        return
    from evaluation import scratch
    from extraction import write_images as write_pictures
    from results import CUDA, guarded, reduced, report
    from stand_ins import stored

    from evalkit.extractors.inception import Inception
    from evalkit.extractors.weights import load_weights
    from evalkit.features.extraction import extract
    from evalkit.images import open_images
    from evalkit.system.ray_engine import ray_engine
    from evalkit.system.run import Run

    count = reduced(4096)
    with scratch(count) as (folder, _), guarded("Ray"), ray_engine() as engine:
        file = folder / "images.npz"
        write_pictures(file, count)
        for name, run in (
            ("alone", Run(store=folder / "alone")),
            ("ray", Run(store=folder / "ray", engine=engine)),
        ):
            begin = time.perf_counter()
            extract(open_images(file), Inception(load_weights(), device=str(CUDA)), run=run)
            report(f"features, {name}, images/s", count / (time.perf_counter() - begin))
        report("features by Ray equal in bytes", stored(folder / "ray") == stored(folder / "alone"))
