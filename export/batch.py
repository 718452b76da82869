"""Batch prediction: what an exported model says of many images, through Apache Beam.

The images are cut into shards. A worker holds one C++ runtime, answers a shard and
writes its file by one rename into `OUT.parts`; a job that was killed goes on with the
shards that are missing. In the end the files become one table. (Beam's own RunInference
would hold every answer back until the last, to bring them into order.)
"""

import contextlib
import csv
import dataclasses
import itertools
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from export.batch_source import Files, Split, open_source
from export.predict import newest_version, shares
from export.runtime import Runtime, RuntimeCrashError
from export.session import StatusError, strings
from keras_vit.model_file import remove_leftovers, replacing, sha256

UNDECODED = "it could not be decoded"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a batch prediction has written.

    Attributes:
        out: The table.
        images: Its number of rows.
        damaged: How many of them have no answer.
    """

    out: Path
    images: int
    damaged: int


def predict_batch(
    directory: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    top: int | None = None,
    shard_size: int = 256,
    data_dir: str | Path | None = None,
    runner: str = "DirectRunner",
    beam_options: Sequence[str] = (),
    progress: bool = True,
) -> Predictions:
    """Write what an exported model says of every image of a source as a table.

    Columns: `file`; `valid`; `class1`, `score1`, ... (of a model of a class for every
    pixel the largest classes with their share of the pixels); `error`. An image that
    cannot be decoded has a row with `valid` false and the reason, and never ends the
    job. Rows are in the order of the source.

    Killed at any moment, the same call goes on with the shards that are missing in
    `OUT.parts`, and ends with the same table.

    Args:
        directory: The version directory, or the folder of versions.
        source: Folder, glob pattern, image file, or `tfds:NAME/SPLIT`.
        out: `.csv`, `.jsonl` (a JSON object a line) or `.parquet`; a new file.
        top: Number of classes; None for as many as the model names.
        shard_size: Images that are written, and made again, together.
        data_dir: Where tensorflow-datasets keeps its data.
        runner: Name of an Apache Beam runner, to whose workers `directory`, `source`
            and `out` must mean the same.
        beam_options: Options for Beam's pipeline, such as `"--region=europe-west1"`.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: If there is no model, or no image.
        FileExistsError: If `out` is there already.
        ValueError: If `out` has another suffix, an option or the source is no such
            thing, or `OUT.parts` belongs to another job.
        RuntimeError: If Apache Beam is not installed, or its pipeline fails.
    """
    directory, out = newest_version(Path(directory)).resolve(), Path(out).resolve()
    _check(out, top, shard_size)
    pipeline = _pipeline(runner, beam_options)
    images = open_source(str(source), data_dir)
    with Predictor(directory, top) as predictor:
        columns = predictor.columns()
    folder = _begin(directory, images, columns, shard_size, out)
    starts = range(0, len(images), shard_size)
    shards = {
        folder / f"{i:06}.jsonl": images.part(start, start + shard_size)
        for i, start in enumerate(starts)
    }
    with tqdm(
        total=len(images),
        initial=_count(shards),
        desc="predict",
        unit=" images",
        dynamic_ncols=True,
        disable=not progress,
    ) as bar:
        missing = [(path, part) for path, part in shards.items() if not path.exists()]
        if missing:
            with _watching(bar, shards):
                _run(pipeline, directory, top, missing)
    with replacing(out) as temporary:
        _WRITERS[out.suffix](temporary, columns, _rows(shards))
    damaged = sum(not row["valid"] for row in _rows(shards))
    shutil.rmtree(folder)
    return Predictions(out, len(images), damaged)


class Predictor:
    """An exported model in a C++ runtime that is opened again if an image ends it.

    Args:
        directory: The version directory.
        top: Number of classes; None for as many as the model names.
    """

    def __init__(self, directory: str | Path, top: int | None = None):
        self.directory = Path(directory)
        manifest = self.directory / "assets.extra" / "manifest.json"
        manifest = json.loads(manifest.read_text())
        self.labels = manifest["labels"]
        self.batch_sizes = sorted(manifest["batch_sizes"])
        self.runtime = Runtime(self.directory)
        described = self.runtime.signatures["serving_default"]
        (self.input,) = described["inputs"]
        named = described["outputs"].get("classes", {"shape": [-1, 5]})["shape"][1]
        self.top = min(len(self.labels), named, top or named)

    def close(self) -> None:
        """End the runtime."""
        self.runtime.close()

    def __enter__(self) -> "Predictor":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def columns(self) -> dict[str, type]:
        """Names and types of what is told of an image."""
        answers = {}
        for i in range(1, self.top + 1):
            answers |= {f"class{i}": str, f"score{i}": float}
        return {"file": str, "valid": bool, **answers, "error": str}

    def rows(self, images: Files | Split) -> Iterator[dict]:
        """A row for each image, by batches of the sizes that the model was made for."""
        waiting = []
        for name, data in images.read():
            waiting.append((name, data))
            if len(waiting) == self.batch_sizes[-1]:
                yield from self._answer(waiting)
                waiting = []
        while waiting:
            size = max(x for x in (1, *self.batch_sizes) if x <= len(waiting))
            yield from self._answer(waiting[:size])
            waiting = waiting[size:]

    def _answer(self, batch):
        data = [x for _, x in batch if not isinstance(x, OSError)]
        answers = iter(self._ask(data) if data else [])
        for name, x in batch:
            if isinstance(x, OSError):
                yield self._row(name, f"it could not be read: {x.strerror}")
            else:
                yield self._row(name, next(answers))

    def _ask(self, data) -> list[list[tuple[str, float]] | str]:
        """For each image its classes and scores, or a sentence."""
        try:
            answer = self.runtime.run("serving_default", **{self.input: strings(data)})
        except RuntimeCrashError as error:
            self.runtime.close()
            self.runtime = Runtime(self.directory)
            problem = str(error)
        except StatusError as error:
            if error.code != "INVALID_ARGUMENT":
                raise
            problem = f"{UNDECODED}: {error.message.splitlines()[0]}"
        else:
            return self._read(answer)
        if len(data) == 1:
            return [problem]
        return [
            self._ask([x])[0] for x in data
        ]  # one of them costs no other its answer

    def _read(self, answer):
        return [
            self._best(answer, row) if valid else f"{UNDECODED}, or is too large"
            for row, valid in enumerate(answer["valid"])
        ]

    def _best(self, answer, row):
        if "classes" in answer:
            names = [x.decode() for x in answer["classes"][row]]
            return list(zip(names, answer["scores"][row], strict=True))[: self.top]
        return shares(answer["label_map_bytes"][row], self.labels, self.top)

    def _row(self, name, answer):
        row = dict.fromkeys(self.columns())
        row |= {"file": name, "valid": not isinstance(answer, str)}
        if not row["valid"]:
            return row | {"error": answer}
        for i, (label, score) in enumerate(answer, 1):
            # As short as tells the float32 from all others.
            row |= {f"class{i}": label, f"score{i}": float(str(score))}
        return row


def _check(out, top, shard_size):
    if out.suffix not in _WRITERS:
        raise ValueError(
            f"The table must end in {', '.join(_WRITERS)}, got {out.name!r}."
        )
    for name, value in (("top", top), ("shard_size", shard_size)):
        if value is not None and not (isinstance(value, int) and value > 0):
            raise ValueError(f"{name} must be a positive int, got {value!r}.")
    if out.exists():
        raise FileExistsError(f"{out} is there already: remove it, or name another.")


def _begin(directory, images, columns, shard_size, out) -> Path:
    """The folder of the shards, new or of the same job.

    Raises:
        ValueError: If it belongs to another job.
    """
    folder = out.with_name(f"{out.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    plan = {
        "model": sha256(directory / "saved_model.pb"),
        "weights": sha256(directory / "variables" / "variables.index"),
        "images": len(images),
        "source": images.fingerprint(),
        "columns": list(columns),
        "shard_size": shard_size,
    }
    path = folder / "plan.json"
    if path.exists():
        begun = json.loads(path.read_text())
        others = [name for name in plan if plan[name] != begun.get(name)]
        if others:
            raise ValueError(
                f"{folder} belongs to another job, with another {', '.join(others)}: "
                "remove it, or name another table."
            )
    elif any(folder.iterdir()):
        raise ValueError(
            f"{folder} must hold the shards of a job, it has no plan.json."
        )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plan, indent=2) + "\n")
    return folder


def _count(shards):
    return sum(len(part) for path, part in shards.items() if path.exists())


@contextlib.contextmanager
def _watching(bar, shards):
    """Move the bar as shards appear, which other processes may write."""
    stop = threading.Event()

    def watch():
        while not stop.wait(0.5):
            bar.update(_count(shards) - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.update(_count(shards) - bar.n)


def _pipeline(runner, options):
    """A pipeline of Apache Beam.

    Raises:
        RuntimeError: If it is not installed.
        ValueError: If it knows no such option.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    except ImportError as error:
        raise RuntimeError(
            f"Batch prediction needs Apache Beam ({error}): pip install "
            '"keras-vit[beam]"'
        ) from error
    flags = list(options)
    if runner == "DirectRunner":
        # By its name it would first try another runner, a program to be downloaded.
        runner = FnApiRunner()
        own = ["--direct_running_mode=in_memory", "--direct_num_workers=1"]
        flags = [*own, *flags]  # of two the last one counts
    return beam.Pipeline(runner=runner, options=PipelineOptions(flags))


def _run(pipeline, directory, top, shards):
    """Write the missing shards in the workers of a pipeline."""
    import apache_beam as beam

    class Predict(beam.DoFn):
        def setup(self):
            self.predictor = Predictor(directory, top)

        def process(self, shard):
            path, part = shard
            lines = (
                json.dumps(x, ensure_ascii=False) for x in self.predictor.rows(part)
            )
            with replacing(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))

        def teardown(self):
            self.predictor.close()

    (
        pipeline
        | "shards" >> beam.Create(shards)
        | "to all workers" >> beam.Reshuffle()
        | "predict" >> beam.ParDo(Predict())
    )
    pipeline.run().wait_until_finish()


def _rows(paths) -> Iterator[dict]:
    for path in paths:
        with path.open() as lines:
            yield from map(json.loads, lines)


def _write_csv(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"valid": str(row["valid"]).lower()})


def _write_lines(path, columns, rows):
    with path.open("w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(path, columns, rows):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    types = {str: arrow.string(), bool: arrow.bool_(), float: arrow.float32()}
    schema = arrow.schema([(name, types[kind]) for name, kind in columns.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(itertools.islice(rows, 10_000)):
            writer.write_table(arrow.Table.from_pylist(some, schema))


_WRITERS = {".csv": _write_csv, ".jsonl": _write_lines, ".parquet": _write_parquet}
