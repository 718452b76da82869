"""`keras-vit serve` under open-loop load, against the limit of the session inside it.

    python benchmarks/serving.py                       # a small model, made for this
    python benchmarks/serving.py models/flowers --rates 0.5,0.9 --seconds 20
    python benchmarks/serving.py models/flowers --url http://localhost:8501

Requests of one image arrive at random (Poisson), whether or not those before them are
answered, as strangers send them: of 20, 17 are whole JPEGs, and the others a damaged
one, one of 1 x 1 pixels and a PNG of 6000 x 6000. The rates are shares of what the C++
session, asked directly for batches of the same images, answers in the same run; `full`
keeps 64 requests in flight. With `--url` another server that serves the same folder is
driven, such as TensorFlow Serving itself. Seconds on a shared machine say little: read
the shares. The exit status is 1 if any whole image was not answered as one.
"""

import argparse
import asyncio
import base64
import io
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import aiohttp
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from export import Runtime
from export.predict import newest_version
from export.session import strings

BATCH = 16
IN_FLIGHT = 64
SEED = 0


def images() -> list[tuple[bytes, bool | None]]:
    """Twenty files, and whether each is a whole image."""
    draw = np.random.default_rng(SEED)

    def encoded(height, width, kind):
        small = draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), "uint8")
        file = io.BytesIO()
        Image.fromarray(small).resize((width, height)).save(file, kind)
        return file.getvalue()

    good = [encoded(*draw.integers(200, 500, 2).tolist(), "JPEG") for _ in range(17)]
    huge = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(huge, "PNG")
    damaged = good[0][: len(good[0]) // 3]
    tiny = encoded(1, 1, "PNG")
    whole = [(x, True) for x in [*good, tiny]]
    return [*whole, (damaged, False), (huge.getvalue(), None)]  # None: as it decides


def small_model(folder: Path) -> Path:
    """Export a model of 4 blocks at 96 pixels."""
    from export import export_saved_model
    from keras_vit import ViT

    model = ViT("deit_tiny", image_size=96, depth=4, num_classes=100)
    return export_saved_model(model, folder / "small").parent


def session_limit(directory: Path, files: list, seconds: float) -> float:
    """Images a second that the session answers, asked for one batch after another."""
    order = random.Random(SEED)
    with Runtime(newest_version(directory)) as runtime:

        def ask():
            batch = strings([order.choice(files)[0] for _ in range(BATCH)])
            runtime.run("serving_default", image_bytes=batch)

        for _ in range(3):
            ask()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            ask()
            count += BATCH
        return count / (time.perf_counter() - start)


class Run:
    """What was answered at one rate, and when."""

    def __init__(self):
        self.latencies: list[float] = []
        self.failed, self.seconds = 0, 0.0

    def row(self, name: str, rate: float, limit: float, batch: float) -> list[str]:
        count = len(self.latencies)
        through = count / self.seconds
        cuts = statistics.quantiles(self.latencies, n=100)
        return [
            name,
            f"{rate:.0f}" if rate else "-",
            f"{through:.0f}",
            f"{through / limit:.2f}",
            f"{batch:.1f}",
            f"{cuts[49] * 1e3:.0f}",
            f"{cuts[98] * 1e3:.0f}",
            str(count),
            str(self.failed),
        ]


async def one(session, url, body, is_whole, run: Run) -> None:
    start = time.perf_counter()
    async with session.post(url, data=body) as answer:
        document = await answer.json(content_type=None)
    run.latencies.append(time.perf_counter() - start)
    valid = answer.status == 200 and document["predictions"][0].get("valid", True)
    if is_whole and not valid:
        run.failed += 1
        print(f"a whole image failed: {answer.status} {str(document)[:200]}")
    if is_whole is False and valid:
        run.failed += 1
        print("a damaged image was answered as a whole one")


async def open_loop(url, bodies, rate: float, seconds: float) -> Run:
    """Send at random times, whatever is answered meanwhile."""
    order, run, tasks = random.Random(SEED), Run(), []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        begin = time.perf_counter()
        due = begin
        while due - begin < seconds:
            due += order.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            body, is_whole = order.choice(bodies)
            tasks.append(asyncio.create_task(one(session, url, body, is_whole, run)))
        await asyncio.gather(*tasks)
        run.seconds = time.perf_counter() - begin
    return run


async def closed_loop(url, bodies, seconds: float) -> Run:
    """Keep a number of requests in flight."""
    order, run = random.Random(SEED), Run()
    async with aiohttp.ClientSession() as session:
        begin = time.perf_counter()

        async def ask():
            while time.perf_counter() - begin < seconds:
                await one(session, url, *order.choice(bodies), run)

        await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
        run.seconds = time.perf_counter() - begin
    return run


def served(directory: Path) -> tuple[subprocess.Popen, str]:
    """Start `keras-vit serve`; the process, and where it listens."""
    code = "from training.command import main; main()"
    process = subprocess.Popen(
        [
            *(sys.executable, "-u", "-c", code, "serve", str(directory)),
            *("--rest-port", "0", "--grpc-port", "0"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if found := re.search(r"REST\s+(http://[\d.:]+)", line):
            return process, found[1]
    raise SystemExit("keras-vit serve ended")


def batches(address: str) -> tuple[float, float]:
    """Rows and batches so far, by the server's own count."""
    path = f"{address}/monitoring/prometheus/metrics"
    with urllib.request.urlopen(path) as answer:
        text = answer.read().decode()
    name = r":tensorflow:serving:batching_session:processed_batch_size_{}{{.*}} (\S+)"
    found = [re.search(name.format(x), text) for x in ("sum", "count")]
    return tuple(float(x[1]) if x else 0.0 for x in found)


def table(rows: list[list[str]]) -> None:
    heads = ["load", "sent/s", "answered/s", "of the session", "batch", "p50 ms"]
    rows = [[*heads, "p99 ms", "requests", "failed"], *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(x.rjust(width) for x, width in zip(row, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", help="folder of versions")
    parser.add_argument("--rates", default="0.25,0.5,0.75", help="of the session's")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--url", help="of another server with the same model")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = given.directory or small_model(Path(scratch))
        process, address = (None, given.url) if given.url else served(directory)
        try:
            failed = drive(directory, address, given)
        finally:
            if process is not None:
                process.terminate()
                process.communicate()
    sys.exit(1 if failed else 0)


def drive(directory: Path, address: str, given) -> int:
    files = images()
    limit = session_limit(directory, files, given.seconds / 2)
    print(f"The session alone, batches of {BATCH}: {limit:.0f} images a second")
    url = f"{address}/v1/models/{directory.resolve().name}:predict"
    template = '{"instances": [{"b64": "%s"}]}'
    bodies = [(template % base64.b64encode(x).decode(), whole) for x, whole in files]
    asyncio.run(closed_loop(url, bodies, 3.0))  # warm
    loads = [(f"{x:.0%}", x * limit) for x in map(float, given.rates.split(","))]
    rows, failed = [], 0
    for name, rate in tqdm([*loads, ("full", 0.0)], unit=" loads"):
        before = batches(address)
        if rate:
            run = asyncio.run(open_loop(url, bodies, rate, given.seconds))
        else:
            run = asyncio.run(closed_loop(url, bodies, given.seconds))
        taken = [b - a for a, b in zip(before, batches(address), strict=True)]
        rows.append(run.row(name, rate, limit, taken[0] / max(taken[1], 1.0)))
        failed += run.failed
    table(rows)
    print(f"{failed} whole images failed.")
    return failed


if __name__ == "__main__":
    main()
