"""Cards are read, damage is refused, the choice of what computes is explained, and a CPU needs no PyTorch."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ct_builder import phantom, write_series
from untrained import damaged, install

from pipelines import openvino_core, runtime, torch_engine
from pipelines.base import Device, Execution, ModelCard, Options, Precision, WeightsDamaged, WeightsMissing, load
from pipelines.base import pipeline_hash as hash_of
from pipelines.dcscn import PlainCNN
from pipelines.ffdnet import FFDNet
from pipelines.openvino_planes import OpenVINOPlanes
from pipelines.runtime import WEIGHTS, Choice, ExecutionRefused, choose, plane_engine, read_card, stream_engine
from pipelines.stresnet import STResNet
from pipelines.torch_engine import TorchPlanes, TorchStream, load_network

NAMES = sorted(card.stem for card in WEIGHTS.glob("*.json"))
"""All networks whose weights ship."""


def test_defaults_ship() -> None:
    assert {"quality-2.5d", "fast-2.5d", "st3d"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_card_is_read_and_knows_its_weights(name: str) -> None:
    card = read_card(name)
    assert card.name == name
    assert card.precision == "fp32"
    assert card.hu_window == (-1024.0, 4000.0)
    assert len(card.patch_zyx) == len(card.overlap_zyx) == 3
    least, most = card.valid_for.pixel_spacing_mm
    assert 0.3 < least <= 0.4
    assert 1.5 <= most < 2
    assert card.measured
    assert card.backend == card.reason == ""
    for suffix in card.files_sha256:
        assert runtime.read_file(card, suffix)


@pytest.mark.parametrize("name", NAMES)
def test_card_and_page_name_no_machine(name: str) -> None:
    text = (WEIGHTS / f"{name}.json").read_text(encoding="utf-8")
    assert not re.search(r'[ "=]/[a-z]', text)
    assert all(source["attribution"] for source in json.loads(text)["training"]["series"])


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    damaged("st3d", tmp_path)
    with pytest.raises(WeightsDamaged, match=r"'st3d' are damaged: st3d.safetensors has SHA-256 .* install"):
        load_network(STResNet(), read_card("st3d", tmp_path), tmp_path)


def test_a_graph_that_is_not_that_of_its_card_is_refused(tmp_path: Path) -> None:
    for suffix in ("json", "safetensors"):
        (tmp_path / f"drl.{suffix}").write_bytes((WEIGHTS / f"drl.{suffix}").read_bytes())
    card, choice = read_card("drl", tmp_path), Choice("openvino", "cpu", "fp32", 1, "")
    with pytest.raises(WeightsMissing, match=r"drl\.xml is missing"):
        plane_engine(card, PlainCNN, choice, tmp_path)
    graph = (WEIGHTS / "drl.xml").read_bytes()
    (tmp_path / "drl.xml").write_bytes(graph.replace(b'dilations="2, 2"', b'dilations="1, 1"'))
    with pytest.raises(WeightsDamaged, match=r"'drl' are damaged: drl\.xml has SHA-256 .* install"):
        plane_engine(card, PlainCNN, choice, tmp_path)
    (tmp_path / "drl.xml").write_bytes(graph)
    assert isinstance(plane_engine(card, PlainCNN, choice, tmp_path), OpenVINOPlanes)


@pytest.mark.parametrize(("stated", "missing"), [("int8.xml", "int8.bin"), ("int8.ranges", "int8.xml")])
def test_a_card_that_lacks_a_file_of_its_int8_is_refused(tmp_path: Path, stated: str, missing: str) -> None:
    (tmp_path / f"drl.{stated}").write_bytes(b"any")
    card = replace(read_card("drl"), files_sha256={stated: hashlib.sha256(b"any").hexdigest()})
    with pytest.raises(WeightsDamaged, match=rf"card of 'drl' .* says nothing of drl\.{missing}: install"):
        plane_engine(card, PlainCNN, Choice("openvino", "cpu", "int8", 1, ""), tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"name": "st3d"', b"[]", b"{}", b"\xff", b'{"patch_zyx": 3}'])
def test_damaged_cards_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "st3d.json").write_bytes(content)
    with pytest.raises(WeightsDamaged, match=r"^the card of 'st3d' is damaged \(st3d.json, .*\): install"):
        read_card("st3d", tmp_path)


# --- What computes it ---

PLANES = {"xml": "a"}
QUANTISED = {"xml": "a", "int8.xml": "b", "int8.bin": "c"}
STREAM: dict[str, str] = {}
QUANTISED_STREAM = {"int8.ranges": "b"}


def _card(files: dict[str, str], loss_db: float | None = None) -> ModelCard:
    card = read_card("st3d" if files in (STREAM, QUANTISED_STREAM) else "drl")
    return replace(card, files_sha256=files, int8_loss_db=loss_db, int8_bound_hu=(9.0, 2.0))


def _machine(monkeypatch: pytest.MonkeyPatch, *flags: str, gpu: str | None = None, torch: bool = True) -> None:
    """A CPU that is fast in `flags`, a GPU that is fastest in `gpu`, PyTorch or none."""
    monkeypatch.setattr(openvino_core, "cpu_supports", lambda precision: precision in ("fp32", *flags))
    monkeypatch.setattr(runtime, "GPU", Path(__file__) if gpu else Path(__file__) / "none")
    monkeypatch.setattr(torch_engine, "fastest_of_gpu", lambda: gpu)
    monkeypatch.setattr(runtime, "find_spec", lambda name: object() if torch else None)


@pytest.mark.parametrize(
    ("files", "loss_db", "flags", "expected", "why"),
    [
        (PLANES, None, ("int8", "bf16"), "bf16", "bf16, the fastest left: there are no INT8 weights"),
        (PLANES, None, ("int8",), "fp32", "fp32: there are no INT8 weights, and it has no instructions for bf16"),
        (PLANES, 0.05, ("int8", "bf16"), "bf16", "there are no INT8 weights"),
        (QUANTISED, 0.05, ("int8", "bf16"), "int8", "int8, the fastest: measured to lose 0.05 dB"),
        (QUANTISED, 0.1, ("int8",), "int8", "measured to lose 0.10 dB"),
        (QUANTISED, -0.01, ("int8",), "int8", "measured to lose 0.00 dB"),
        (QUANTISED, 0.14, ("int8", "bf16"), "bf16", "it loses 0.14 dB in int8, more than 0.1"),
        (QUANTISED, None, ("int8", "bf16"), "bf16", "nobody has measured what it loses in int8"),
        (QUANTISED, 0.05, ("bf16",), "bf16", "it has no instructions for int8"),
        (QUANTISED, 0.05, (), "fp32", "it has no instructions for int8, and it has no instructions for bf16"),
        (STREAM, None, ("int8", "bf16"), "bf16", "there are no INT8 weights"),
        (QUANTISED_STREAM, 0.02, ("int8", "bf16"), "int8", "measured to lose 0.02 dB"),
    ],
)
def test_the_fastest_that_the_card_vouches_for_runs_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    loss_db: float | None,
    flags: tuple[str, ...],
    expected: str,
    why: str,
) -> None:
    _machine(monkeypatch, *flags)
    choice = choose(_card(files, loss_db), Execution(threads=3))
    assert (choice.backend, choice.device, choice.precision, choice.threads) == ("openvino", "cpu", expected, 3)
    assert choice.reason.startswith("the CPU (there is no GPU), ")
    assert choice.reason.endswith(why)


@pytest.mark.parametrize("files", [QUANTISED, QUANTISED_STREAM])
def test_int8_that_cannot_be_checked_runs_only_where_it_is_demanded(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    _machine(monkeypatch, "int8", "bf16")
    card = replace(_card(files, 0.05), int8_bound_hu=None)
    choice = choose(card, Execution())
    assert choice.precision == "bf16"
    assert choice.reason.endswith("its card has no bound to check its int8 by")
    assert choose(card, Execution(precision="int8")).precision == "int8"


@pytest.mark.parametrize("precision", ["int8", "bf16", "fp32"])
def test_a_precision_may_be_set(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    _machine(monkeypatch, "int8", "bf16", gpu="bf16")
    choice = choose(_card(QUANTISED, 0.3), Execution("cpu", precision))
    assert (choice.backend, choice.precision) == ("openvino", precision)
    assert choice.reason == f"the CPU (as configured), {precision} as configured"
    assert choice.threads >= 1


@pytest.mark.parametrize(
    ("device", "precision", "gpu", "torch", "expected", "why"),
    [
        ("auto", "auto", "bf16", True, ("torch", "cuda", "bf16"), "the GPU, bf16, the fastest on it"),
        ("auto", "auto", "fp16", True, ("torch", "cuda", "fp16"), "the GPU, fp16, the fastest on it"),
        ("cuda", "auto", "fp16", True, ("torch", "cuda", "fp16"), "the GPU, fp16, the fastest on it"),
        ("cuda", "fp32", "bf16", True, ("torch", "cuda", "fp32"), "the GPU, fp32 as configured"),
        ("auto", "bf16", "bf16", True, ("torch", "cuda", "bf16"), "the GPU, bf16 as configured"),
        ("auto", "bf16", "fp16", True, ("openvino", "cpu", "bf16"), "the CPU (no GPU is used for bf16), bf16 as con"),
        ("auto", "int8", "bf16", True, ("openvino", "cpu", "int8"), "the CPU (no GPU is used for int8), int8 as con"),
        ("auto", "auto", "bf16", False, ("openvino", "cpu", "int8"), "the CPU (there is a GPU, but not PyTorch, which"),
        ("cpu", "auto", "bf16", True, ("openvino", "cpu", "int8"), "the CPU (as configured), int8, the fastest"),
    ],
)
def test_a_gpu_is_used_where_pytorch_can(
    monkeypatch: pytest.MonkeyPatch,
    device: Device,
    precision: Precision,
    gpu: str,
    torch: bool,
    expected: tuple[str, str, str],
    why: str,
) -> None:
    _machine(monkeypatch, "int8", "bf16", gpu=gpu, torch=torch)
    for files in (QUANTISED, QUANTISED_STREAM):
        choice = choose(_card(files, 0.05), Execution(device, precision))
        assert (choice.backend, choice.device, choice.precision) == expected
        assert choice.reason.startswith(why)


def test_a_driver_without_a_gpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, "bf16")
    monkeypatch.setattr(runtime, "GPU", Path(__file__))
    choice = choose(_card(PLANES), Execution())
    assert choice.reason.startswith("the CPU (PyTorch finds no GPU that it can use), bf16")


@pytest.mark.parametrize(
    ("execution", "files", "gpu", "torch", "told"),
    [
        (Execution("cpu", "int8"), PLANES, None, True, r"no INT8 weights of drl: set precision auto, .* quantize drl`"),
        (Execution("cpu", "int8"), QUANTISED, None, True, "int8 would be no faster on this CPU.*: set precision auto"),
        (Execution("auto", "bf16"), PLANES, None, True, "bf16 would be no faster on this CPU.*: set precision auto"),
        (Execution("cuda"), PLANES, None, False, "needs PyTorch, which is not installed: install the extra gpu"),
        (Execution("cuda"), PLANES, None, True, "PyTorch finds no GPU that it can use: install its driver, or set"),
        (Execution("cuda", "int8"), QUANTISED, "bf16", True, "the GPU does not run drl in int8: set precision auto"),
        (Execution("cuda", "bf16"), PLANES, "fp16", True, "does not run drl in bf16: set .* auto, which takes fp16"),
        (Execution(), {"int8.bin": "b"}, None, False, "no graph of drl for OpenVINO, .* export --graph drl` makes one"),
        (Execution("cpu", "bf16"), {"int8.bin": "b"}, None, True, "only by PyTorch .* in fp32"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    execution: Execution,
    files: dict[str, str],
    gpu: str | None,
    torch: bool,
    told: str,
) -> None:
    _machine(monkeypatch, gpu=gpu, torch=torch)
    with pytest.raises(ExecutionRefused, match=told):
        choose(_card(files, 0.05), execution)


def test_a_network_without_a_graph_is_left_to_pytorch(tmp_path: Path) -> None:
    network = PlainCNN()
    install(tmp_path, "plain", network, "slice")
    card = read_card("plain", tmp_path)
    choice = choose(card, Execution(device="cpu"))
    assert (choice.backend, choice.device, choice.precision) == ("torch", "cpu", "fp32")
    assert choice.reason == "the CPU, by PyTorch in fp32: there is no graph of it for OpenVINO"
    assert isinstance(plane_engine(card, PlainCNN, choice, tmp_path), TorchPlanes)


def test_choice_and_reason_stand_in_the_card_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        card = load("drl", Execution("cpu", "fp32")).card
    assert (card.backend, card.precision) == ("openvino", "fp32")
    assert card.reason == "the CPU (as configured), fp32 as configured"
    assert f"drl runs on {card.reason}" in caplog.text


def test_what_computes_is_part_of_the_hash() -> None:
    card = replace(read_card("drl"), backend="openvino", files_sha256=QUANTISED)
    other = [
        replace(card, backend="torch"),
        replace(card, precision="bf16"),
        replace(card, precision="int8"),
        replace(card, precision="int8", floats="bf16"),
        replace(card, precision="int8", files_sha256={**QUANTISED, "int8.bin": "d"}),
        replace(card, files_sha256={**QUANTISED, "xml": "d"}),
    ]
    assert len({hash_of(one, Options()) for one in (card, *other)}) == 7
    unused = replace(card, files_sha256=PLANES, reason="another", int8_loss_db=0.1)  # int8 files do not run in fp32
    assert hash_of(unused, Options()) == hash_of(card, Options())


@pytest.mark.parametrize("floats", ["bf16", "fp32"])
def test_what_is_left_in_float_is_part_of_it_where_8_bits_are_the_rest(
    monkeypatch: pytest.MonkeyPatch, floats: Precision
) -> None:
    """A CPU without bf16 makes other voxels than one with it, and a UID names one image."""
    monkeypatch.setattr(openvino_core, "cpu_supports", lambda precision: precision in ("fp32", "int8", floats))
    assert load("fast-2.5d", Execution("cpu", "int8")).card.floats == floats
    assert load("fast-2.5d", Execution("cpu", "fp32")).card.floats == ""


def test_both_engines_of_volumes_agree() -> None:
    card = read_card("st3d")
    planes = list(np.random.default_rng(0).normal(0, 0.3, (4, 24, 40)).astype(np.float32))
    ours = stream_engine(card, STResNet, Choice("openvino", "cpu", "fp32", 1, ""), WEIGHTS)
    reference = stream_engine(card, STResNet, Choice("torch", "cpu", "fp32", 1, ""), WEIGHTS)
    assert isinstance(reference, TorchStream)
    for shape in ((24, 40), (16, 40)):  # the engine follows the size
        cut = [plane[: shape[0]] for plane in planes]
        pairs = zip(ours.stream(iter(cut), shape), reference.stream(iter(cut), shape), strict=True)
        assert max(float(np.abs(one - two).max()) for one, two in pairs) < 1e-5


def test_pytorch_in_short_precision_rounds_and_gives_float32(tmp_path: Path) -> None:
    """On a GPU; here on the CPU, whose bfloat16 is the same."""
    install(tmp_path, "fast", FFDNet(), "slab3", noise_map=True)
    card = read_card("fast", tmp_path)
    slices = np.random.default_rng(0).normal(0, 0.3, (3, 32, 48)).astype(np.float32)
    noise_map = np.full((1, 16, 24), 0.03, np.float32)
    exact = TorchPlanes(FFDNet(), card, tmp_path)(slices, noise_map)
    short = TorchPlanes(FFDNet(), card, tmp_path, "cpu", "bf16")(slices, noise_map)
    assert short.dtype == exact.dtype == np.float32
    error, change = float(np.std(short - exact)), float(np.std(exact - slices[1]))
    assert 2**-12 * change < error < 2**-4 * change


WITHOUT = """
import sys
from datetime import datetime, timezone
from pathlib import Path
import dicomnode.node, dicomnode.worker, pipelines.shipped
from dicomnode.config import Derivation
from dicomnode.denoise import denoise_series
from pipelines.base import Execution, Options, load

assert not {"torch", "openvino"} & set(sys.modules), "on import"
files = sorted(Path(sys.argv[1]).glob("*.dcm"))
for name in ("quality-2.5d", "st3d"):
    manifest = denoise_series(
        files,
        Path(sys.argv[1]) / name,
        pipeline=load(name, Execution(device="cpu", threads=1)),
        options=Options(),
        fingerprint="f" * 64,
        settings=Derivation(),
        created_at=datetime(2026, 11, 21, tzinfo=timezone.utc),
        report=lambda progress: None,
    )
    print(len(manifest.instances))
print(sorted(name for name in sys.modules if name.partition(".")[0] == "torch"))
"""


def test_a_node_on_a_cpu_imports_no_pytorch(tmp_path: Path) -> None:
    """Neither when it starts nor from files to files; OpenVINO only with the first network."""
    write_series(tmp_path, phantom(3, 48), spacing_mm=(2.0, 1.2, 1.2))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.split("\n")[:-1] == ["3", "3", "[]"]
