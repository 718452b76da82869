"""What a server's memory holds of an exported model: weights as variables or constants.

    python benchmarks/frozen.py

ViT-S/16 is exported each way in bfloat16, loaded in the TensorFlow C++ session, and
each signature is asked once, two rows; the resident memory of the session's process is
told after loading, after the first signature and after all. Linux alone.
"""

import tempfile
from pathlib import Path

from machine import show

import keras_vit
from export import Runtime, export_saved_model
from export.requests import sample


def resident_megabytes(pid: int) -> int:
    """Resident memory of a process, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kilobytes = next(x.split()[1] for x in lines if x.startswith("VmRSS"))
    return int(kilobytes) * 1024 // 10**6


def row(model, folder: str, freeze: bool) -> dict[str, str]:
    """One way of export, and what its session holds, in MB."""
    version = export_saved_model(
        model, folder, precision="bfloat16", freeze=freeze, progress=False
    )
    with Runtime(version) as runtime:
        held = [resident_megabytes(runtime.pid)]
        for name, signature in runtime.signatures.items():
            runtime.run(name, **sample(signature["inputs"], 2))
            held.append(resident_megabytes(runtime.pid))
    return {
        "weights": "constants" if freeze else "variables",
        "loaded, MB": str(held[0]),
        "one signature, MB": str(held[1]),
        f"all {len(held) - 1}, MB": str(held[-1]),
    }


def main() -> None:
    model = keras_vit.ViT("small", image_size=224, num_classes=1000)
    with tempfile.TemporaryDirectory() as folder:
        show([row(model, folder, freeze) for freeze in (False, True)])


if __name__ == "__main__":
    main()
