"""What the benchmarks count and write; that they run at all is for the slow ones."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import kernels
import pytest
import startup
import table
import throughput
from conftest import to_numpy
from contestants import BUILDERS, COMPILED, Contestant, Job, keras_vit_model
from machine import options_of

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.first
@pytest.mark.parametrize(
    "variant, size, giga",  # multiplications with addition, as timm's results tell
    [("small", 224, 4.61), ("base", 224, 17.58), ("large", 224, 61.60)],
)
def test_the_flops_of_a_model_are_those_that_are_published(variant, size, giga):
    job = Job(variant=variant, image_size=size)
    assert gpu.flops(job, "inference") == pytest.approx(2e9 * giga, rel=5e-3)
    assert gpu.flops(job, "training") == 3 * gpu.flops(job, "inference")


@pytest.mark.first
def test_the_peak_is_that_of_the_device():
    assert gpu.peak_of("NVIDIA H100 80GB HBM3", None) == 989.4e12
    assert gpu.peak_of("NVIDIA H100 PCIe", None) == 756e12
    assert gpu.peak_of("NVIDIA H200", None) == 989.4e12
    assert gpu.peak_of("cpu", None) is None
    assert gpu.peak_of("cpu", 2.5) == 2.5e12


@pytest.mark.first
def test_a_trace_is_read_kernel_by_kernel():
    line = "onednn_verbose,v1,primitive,exec,cpu,{},forward_training,{}\n"
    product = "inner_product,x64:gemm:jit", "src:bf16,post:eltwise_gelu_tanh,,{},{}"
    after = line.format(product[0], product[1].format("mb8ic4oc16", 2.0))
    trace = f"batch 0\n{after}took 1\nbatch 1\n{after}{after}took 2\n"
    found = list(kernels.kernels(trace, batches=1))
    name = "inner_product + eltwise_gelu_tanh"
    assert found == [(name, "x64:gemm:jit", "mb8ic4oc16", 2.0)] * 2
    assert kernels.operations("mb8ic4oc16") == 2 * 8 * 4 * 16
    assert kernels.operations("2x3x5x7:2x3x7x11") == 2 * 2 * 3 * 5 * 7 * 11
    assert kernels.operations("16x6x197x197") == 0
    assert kernels.operations("mb1ic3152ih384iw1") == 0


@pytest.mark.first
def test_our_contestant_has_weights_that_no_optimizer_leaves_out():
    model = keras_vit_model(Job(variant="tiny", image_size=32, depth=2))
    for weight in model.trainable_variables:
        if len(weight.shape) == 1:
            values = to_numpy(weight)
            assert not {0.0, 1.0} & set(values.tolist()), weight.path


@pytest.mark.first
def test_who_competes_can_be_built_and_is_compiled_only_where_asked():
    names = [x.name for x in throughput.contestants(["jax", "torch"], False)]
    more = [x.name for x in throughput.contestants(["jax", "torch"], True)]
    assert more == names[:2] + [COMPILED] * 2 + names[2:]
    assert set(more) <= set(BUILDERS)


@pytest.mark.first
def test_the_peak_of_a_process_is_its_own():
    code = "from machine import peak_memory; print(peak_memory())"
    ballast = bytearray(b"1" * 2**29)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, check=True
    )
    assert 2**20 < int(run.stdout) < len(ballast) // 2


def turn(contestant, number, seconds, **others):
    job = gpu.QUICK[0]
    more = {"steps": 2, "peak_bytes": 2**30, "device": "NVIDIA H200", "error": ""}
    found = gpu.described(job, "inference", contestant)
    return {**found, **more, "round": number, "seconds": seconds, **others}


@pytest.mark.first
def test_a_table_is_made_of_the_turns_in_the_file(tmp_path):
    path = tmp_path / "turns.csv"
    options = gpu.options_of(["--quick", f"--output={path}"])
    jax, torch, timm = options.contestants
    assert gpu.read(path) == []
    for number, ours, theirs in ((1, 2.0, 1.0), (2, 1.0, 2.0), (3, 0.5, 2.0)):
        gpu.append(path, turn(jax, number, ours))
        gpu.append(path, turn(timm, number, theirs))
    gpu.append(path, turn(torch, 0, "", error="out of memory"))
    first, second, third, *_ = gpu.table(options)
    assert first["ratio to timm"] == "2.00" and third["ratio to timm"] == "1.00"
    assert first["images/s"] == "4.0" and first["peak GiB"] == "1.00"
    mfu = 4 * gpu.flops(gpu.QUICK[0], "inference") / 989.4e12
    assert first["MFU"] == f"{mfu:.1%}" and first["device"] == "NVIDIA H200"
    assert second["images/s"] == "-" and second["device"] == "out of memory"


@pytest.mark.first
def test_a_line_that_a_kill_has_cut_is_asked_again(tmp_path):
    path = tmp_path / "turns.csv"
    gpu.read(path)
    contestant = Contestant("keras_vit", "jax", ())
    gpu.append(path, turn(contestant, 1, 2.0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:20])
    assert [x["round"] for x in gpu.read(path)] == ["1"]
    assert path.read_bytes() == whole
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"must be a new file .* has \['a', 'b'\]"):
        gpu.read(path)


@pytest.mark.first
def test_throughput_has_ratios_to_both_references_round_by_round():
    options = options_of(throughput.parser(), batch_sizes=[1], precisions=["float32"])
    ours = Contestant("keras_vit", "tensorflow", ())
    cell = (1, "float32", "inference")
    speeds = {
        (ours, *cell): [2.0, 4.0, 8.0],
        (throughput.BASELINE, *cell): [1.0, 1.0, 8.0],
        (throughput.CONVERTED, *cell): [4.0, 8.0, 8.0],
    }
    (row,) = throughput.table([ours], speeds, options)
    assert row["inference images/s"] == "4.0" and row["training images/s"] == "-"
    assert row["inference / KerasHub"] == "2.00"
    assert row["inference / OpenVINO"] == "0.50"


@pytest.mark.first
def test_a_part_that_fails_is_a_row_of_the_table(monkeypatch):
    def fail(options):
        raise OSError("no disk\nat all")

    monkeypatch.setattr(startup, "rows", fail)
    options = table.parser().parse_args(["--quick"])
    (row,) = table.rows("startup", options)
    assert row == {"part": "startup", "error": "OSError: no disk"}


def quick(path, *arguments, **options):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--quick", f"--output={path}"]
    command += ["--no-timm", "--rounds=1"]  # torch.compile takes minutes on a CPU
    return subprocess.Popen([*command, *arguments], text=True, **options)


def rounds(path):
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["round"]]


@pytest.mark.slow
@pytest.mark.first
def test_the_benchmark_of_a_gpu_goes_on_where_it_was_killed(tmp_path):
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    path = tmp_path / "turns.csv"
    process = quick(path, "--remat", start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (path.exists() and len(rounds(path)) >= 1):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    process = quick(path, "--remat", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert path.read_bytes().startswith(before)
    found = rounds(path)
    keys = [(*gpu.key(row), row["round"]) for row in found]
    assert len(set(keys)) == len(keys)
    good = {gpu.key(row)[3:] for row in found if row["seconds"]}
    for name in ("keras_vit on jax", "keras_vit on torch"):
        for kind in (name, f"{name}, remat"):
            assert {("inference", kind), ("training", kind)} <= good
    lines = output.splitlines()
    assert lines[0].split()[:3] == ["model", "pixels", "task"]
    assert len([x for x in lines if x.startswith("tiny/16")]) == 2 * 4


@pytest.mark.slow
def test_startup_tells_what_the_package_adds_to_the_import_of_keras():
    import keras

    backend = keras.backend.backend()
    options = options_of(
        startup.parser(),
        rounds=1,
        backends=[backend],
        build="tiny",
        exports=[backend],
        export="tiny",
    )
    found = startup.rows(options)
    assert [row["error"] for row in found] == [""] * len(found)
    told = {row["what"]: row for row in found}
    assert float(told["import keras_vit"]["seconds"]) > 0
    assert "first request after warm-up" in told and "build ViT tiny" in told
