"""Run a module in a process that imports no more than it needs.

    python -m export.lean export.worker job.json

Where JAX, Matplotlib and scikit-learn are installed, TensorFlow and Keras import them:
more than a third of the seconds that it takes to import both, for nothing that is used.
"""

import runpy
import sys

UNNEEDED = {"jax", "matplotlib", "sklearn"}


class _Absent:
    """A finder of modules to which these are not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in UNNEEDED:
            raise ModuleNotFoundError(f"{name} is not needed here", name=name)


def main() -> None:
    """Run the module that the first argument names with the other arguments."""
    sys.meta_path.insert(0, _Absent)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
