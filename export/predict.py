"""What an exported model says of image files, in words."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from export.runtime import Runtime
from export.session import strings
from export.versions import versions

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp")


def predict_files(
    directory: str | Path,
    files: Sequence[Path],
    top: int = 3,
    label_maps: str | Path | None = None,
) -> Iterator[tuple[Path, list[str] | None]]:
    """Ask an exported model about files, one by one, in the C++ runtime.

    Args:
        directory: The version directory.
        files: Image files.
        top: Number of classes to name.
        label_maps: Folder in which a model of label maps leaves a PNG for each file;
            None for none. It is made as soon as it is needed.

    Yields:
        The file, and its best classes with their scores, or the largest classes with
        their share of the pixels; None for a file that cannot be decoded.

    Raises:
        ValueError: If `label_maps` is given and the model answers with classes, or two
            files have one name.
        StatusError: If the runtime fails otherwise.
    """
    check_names(files, label_maps)
    manifest = Path(directory) / "assets.extra" / "manifest.json"
    with Runtime(directory) as runtime:
        outputs = runtime.signatures["serving_default"]["outputs"]
        if label_maps is not None and "label_map_bytes" not in outputs:
            raise ValueError(
                f"{directory} must answer with label maps for them to be saved, it "
                f"answers with {', '.join(sorted(outputs))}."
            )
        for file in tqdm(files, unit=" images", disable=len(files) < 10):
            data = strings([file.read_bytes()])
            answer = runtime.run("serving_default", image_bytes=data)
            if not answer["valid"][0]:
                yield file, None
                continue
            labels = json.loads(manifest.read_text())["labels"]
            yield file, in_words(file, answer, top, label_maps, labels)


def in_words(
    file: Path,
    answer: Mapping[str, np.ndarray],
    top: int,
    label_maps: str | Path | None = None,
    labels: Sequence[str] | None = None,
) -> list[str]:
    """The best classes of one file with their scores, or the largest with their share.

    Args:
        file: The file, after which a label map is named.
        answer: What the model says of it, one row.
        top: Number of classes to name.
        label_maps: Folder for a label map; None for none.
        labels: Name of each class of a label map; None for numbers.
    """
    if "classes" in answer:
        return _best(answer, top)
    png = bytes(answer["label_map_bytes"][0])
    if label_maps is not None:
        folder = Path(label_maps)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{file.stem}_labels.png").write_bytes(png)
    found = shares(png, labels or [f"class {i}" for i in range(2**16)], top)
    return [f"{label} {share:.1%} of pixels" for label, share in found if share > 0]


def classify_files(
    directory: str | Path, files: Sequence[bytes], batch_size: int = 60
) -> list[tuple[str, float]]:
    """Ask an exported classifier about encoded images, many at once.

    Args:
        directory: The version directory.
        files: What the files hold.
        batch_size: Files a request.

    Returns:
        The best class of each file, and its score.

    Raises:
        StatusError: If one cannot be decoded, or the runtime fails otherwise.
    """
    answers = []
    with Runtime(directory) as runtime:
        for start in tqdm(range(0, len(files), batch_size), unit=" batches"):
            batch = strings(files[start : start + batch_size])
            answer = runtime.run("strict", image_bytes=batch)
            names = [name.decode() for name in answer["classes"][:, 0]]
            answers += zip(names, answer["scores"][:, 0].tolist(), strict=True)
    return answers


def newest_version(directory: Path) -> Path:
    """The version directory itself, or the newest version in a folder of versions.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if (directory / "saved_model.pb").is_file():
        return directory
    found = versions(directory)
    if not found:
        raise FileNotFoundError(
            f"{directory} must be an exported version (with saved_model.pb) or a "
            "folder of versions."
        )
    return found[-1].path


def image_files(path: Path) -> list[Path]:
    """The image file itself, or those of a folder and its folders, in order.

    Raises:
        FileNotFoundError: If there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no image file or folder {path}.")
    files = [x for x in sorted(path.rglob("*")) if x.suffix.lower() in SUFFIXES]
    if not files:
        raise FileNotFoundError(f"{path} contains no image ({', '.join(SUFFIXES)}).")
    return files


def _best(answer, top):
    pairs = zip(answer["classes"][0], answer["scores"][0], strict=True)
    return [f"{name.decode()} {score:.1%}" for name, score in pairs][:top]


def shares(png: bytes, labels: Sequence[str], top: int) -> list[tuple[str, np.float32]]:
    """The largest classes of a label map, and their share of its pixels.

    Args:
        png: The label map, as a model answers with it.
        labels: Name of each class.
        top: Number of classes.
    """
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(png)))
    counts = np.bincount(pixels.reshape(-1), minlength=len(labels))
    parts = (counts / pixels.size).astype("float32")
    largest = np.argsort(-parts, kind="stable")[:top]
    return [(labels[i], parts[i]) for i in largest]


def check_names(files: Sequence[Path], label_maps: str | Path | None) -> None:
    """Label maps are named after their files: each must have a name of its own.

    Raises:
        ValueError: If `label_maps` is given and two files have one name.
    """
    found = Counter(file.stem for file in files)
    same = [stem for stem, count in found.items() if count > 1]
    if label_maps is not None and same:
        named = [str(x) for x in files if x.stem == same[0]]
        raise ValueError(
            f"Label maps are named after their files: {named[0]} and {named[1]} would "
            f"both be {same[0]}_labels.png. Ask for one folder after the other."
        )
