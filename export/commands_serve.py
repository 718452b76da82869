"""The command that serves an exported model on this machine."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

PIXEL = (  # a whole image: 8 x 8 grey pixels
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEE"
    "lEQVR42mNsYIAAJgaKGAAmCACQtTEKkQAAAABJRU5ErkJggg=="
)

app = typer.Typer()
LIGHT = ("serve", "predict")  # commands that do without TensorFlow in their process
console = Console(highlight=False, soft_wrap=True)


@app.command()
def serve(
    directory: Annotated[
        Path, typer.Argument(help="Folder of the versions, or one version directory.")
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model.", show_default="that of the folder"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    rest_port: Annotated[int, typer.Option(help="Port of REST.")] = 8501,
    grpc_port: Annotated[int, typer.Option(help="Port of gRPC.")] = 8500,
    docker: Annotated[
        bool, typer.Option("--docker", help="Run TensorFlow Serving's image.")
    ] = False,
    tensorflow_serving: Annotated[
        bool,
        typer.Option("--tensorflow-serving", help="Run tensorflow_model_server."),
    ] = False,
) -> None:
    """Serve an exported model over REST and gRPC, as TensorFlow Serving does."""
    if docker or tensorflow_serving:
        folder, name = _folder(directory, name)
        command = _docker if docker else _model_server
        arguments = command(folder, name, host, rest_port, grpc_port)
        console.print(" ".join(arguments), markup=False)
        os.execvp(arguments[0], arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a port in use is told once
    try:
        from export.server import Server, serve_until_told
    except ImportError as error:
        raise ImportError(
            f'{error}. Serving needs pip install "keras-vit[serve]".'
        ) from error

    server = Server(directory, name, host, rest_port, grpc_port)
    serve_until_told(server, _announce)
    console.print("Ended: every request in flight was answered.")


def _announce(server) -> None:
    model, served = server.model, server.model.served
    rest = f"http://{server.host}:{server.rest_port}"
    url = f"{rest}/v1/models/{model.name}"
    default = served.signatures.get("serving_default", {"inputs": {}})
    say = lambda text: console.print(text, markup=False)  # noqa: E731
    say(f"Serving {model.name}, version {served.number} of {model.directory}")
    say(f"  REST   {url}")
    say(f"  gRPC   {server.host}:{server.grpc_port}")
    say(f"  also   {url}/metadata, {rest}/monitoring/prometheus/metrics")
    say(f"  asks   {', '.join(served.signatures)}")
    if [x["dtype"] for x in default["inputs"].values()] == ["DT_STRING"]:
        body = f'{{"instances": [{{"b64": "{PIXEL}"}}]}}'
        say("A first request (an image of 8 x 8 pixels), and one of your own:")
        say(f"  curl -d '{body}' {url}:predict")
        say(f"  keras-vit predict --server {rest} IMAGE ...")
    say(
        "This is the embedded server, for one machine and its developer. Production is "
        "TensorFlow Serving:"
    )
    say(f"  keras-vit serve --docker {model.directory}")
    _tell_of_versions()


def _tell_of_versions() -> None:
    """Print a line for every version that is loaded, fails to or is unloaded."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("keras_vit.serve")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)


def _folder(directory: Path, name: str | None) -> tuple[Path, str]:
    from export.versions import versions

    directory = directory.resolve()
    if not versions(directory):
        raise FileNotFoundError(
            f"{directory} must be a folder of versions: TensorFlow Serving looks for "
            "numbered folders in it."
        )
    return directory, name or directory.name


def _docker(folder, name, host, rest_port, grpc_port) -> list[str]:
    from export.bundle import IMAGE

    if shutil.which("docker") is None:
        raise FileNotFoundError("--docker needs the program docker, which is not here.")
    probe = subprocess.run(["docker", "info"], capture_output=True, text=True)
    if probe.returncode:
        told = probe.stderr.strip().splitlines() or ["docker info fails"]
        raise RuntimeError(f"--docker needs a Docker that runs: {told[-1]}")
    return [
        *("docker", "run", "--rm", "--init"),
        *("-p", f"{host}:{grpc_port}:8500", "-p", f"{host}:{rest_port}:8501"),
        *("-v", f"{folder}:/models/{name}:ro", "-e", f"MODEL_NAME={name}"),
        *(IMAGE, "--enable_batching", "--enable_per_model_batching_parameters"),
    ]


def _model_server(folder, name, host, rest_port, grpc_port) -> list[str]:
    program = "tensorflow_model_server"
    if shutil.which(program) is None:
        raise FileNotFoundError(
            f"--tensorflow-serving needs the program {program} on the PATH."
        )
    if host != "127.0.0.1":
        raise ValueError(f"{program} listens on every address: leave --host out.")
    return [
        *(program, f"--port={grpc_port}", f"--rest_api_port={rest_port}"),
        *(f"--model_name={name}", f"--model_base_path={folder}"),
        *("--enable_batching", "--enable_per_model_batching_parameters"),
    ]
