"""What an experiment is, and how it is run.

Keras is not imported here: what processes are sent is of this file, and what it prints
when it is imported belongs into their logs.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Setting:
    """How an experiment is run.

    Args:
        folder: Where its runs and results are kept.
        suffix: What `folder` ends with, after the name of the experiment.
        data: Pictures that its images are made of, `"digits"` or what
            `training.load_data` takes.
        scale: `"full"`, `"quick"` or `"gpu"`.
        choosing: Whether the learning rate is being chosen: then a part of the
            training pictures is held out, and those of the test are not looked at.
        learning_rates: For each arm, chosen before.
    """

    folder: Path
    suffix: str = ""
    data: str = "digits"
    scale: str = "full"
    choosing: bool = False
    learning_rates: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def quick(self) -> bool:
        """Whether it is only to be seen that everything runs."""
        return self.scale == "quick"

    def beside(self, name: str) -> Path:
        """A folder of the same setting that experiments share."""
        return self.folder.with_name(name + self.suffix)

    def pick(self, full, quick, gpu=None):
        """The value for the scale."""
        if self.scale == "gpu":
            return full if gpu is None else gpu
        return quick if self.quick else full


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One question, and how it is answered.

    Args:
        name: That of its file.
        about: Its docstring.
        factors: Columns that tell a run from others, beside the seed; the first is
            `"arm"`.
        jobs: From the setting to the factors of all runs of a seed.
        run: From the factors and the seed of a run, the setting and a folder for it, to
            its rows: dictionaries of what was measured.
        labels: Columns that tell a row of a run from its others.
        measure: Column that is compared with the record.
        score: Column that decides which learning rate is best, the smaller the better.
        report: From all rows and the setting to the table, in Markdown.
        draw: From all rows, the setting and a path to the picture.
        quick: Arms that `--quick` runs.
        rates: Learning rates that `--choose` tries.
        gpu: Whether there is a scale for a GPU.
        after: What is done when all runs are, from the setting.
        choice: Name of the experiment that chose the learning rates; "" for this one.
    """

    name: str
    about: str
    factors: tuple[str, ...]
    jobs: Callable[[Setting], list[dict]]
    run: Callable[[dict, Setting, Path], list[dict]]
    report: Callable[[list[dict], Setting], str]
    draw: Callable[[list[dict], Setting, Path], None]
    quick: tuple[str, ...]
    labels: tuple[str, ...] = ()
    measure: str = "accuracy"
    score: str = "cross_entropy"
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    gpu: bool = False
    after: Callable[[Setting], None] | None = None
    choice: str = ""
