"""The arithmetic of the benchmarks: operations, images, rows and bars, and that what is timed is what it says."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ct_builder import phantom, write_series

from pipelines.base import ModelCard
from pipelines.ffdnet import FFDNet
from pipelines.redcnn import REDCNN
from pipelines.shipped import fast_2p5d, st3d
from pipelines.stresnet import SRResNet3D, STResNet
from pipelines.volume import read_volume
from training.metrics import LUNG, SOFT_TISSUE

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # they are scripts, not a package
ct_files, images, operations, papers, series, table1, table1_gpu, turn, versus = map(
    importlib.import_module,
    ("ct_files", "images", "operations", "papers", "series", "table1", "table1_gpu", "turn", "versus"),
)


# operations


@pytest.mark.parametrize(("features", "blocks"), [(64, 8), (5, 3)])
def test_operations_of_the_networks_for_volumes(features: int, blocks: int) -> None:
    voxels, inner = 4 * 6 * 10, 2 * blocks + 1
    whole = 27 * features + inner * 27 * features**2 + 27 * features
    parted = (9 + 3 * features) * features + inner * (9 + 3) * features**2 + 9 * features + 3
    shape = (1, 1, 4, 6, 10)
    assert operations.products(SRResNet3D(features, blocks), shape) == voxels * whole
    assert operations.products(STResNet(features, blocks), shape) == voxels * parted


def test_operations_of_a_slice() -> None:
    def card(given: str, *, noise_map: bool = False) -> Any:
        return SimpleNamespace(input=given, noise_map=noise_map)

    # 13 → 64 → … → 64 → 4 channels at half the resolution; 101 columns are brought up to 102
    at_half = 9 * (13 * 64 + 8 * 64 * 64 + 64 * 4)
    assert operations.of_slice(fast_2p5d, card("slab3", noise_map=True), 64, 101) == 32 * 51 * at_half
    assert operations.of_slice(st3d, card("volume"), 7, 9) == operations.products(STResNet(), (1, 1, 5, 7, 9)) // 5


def test_operations_of_convolutions_without_padding_and_of_transposed_ones() -> None:
    sizes = [30 - 4 * k for k in range(1, 6)]  # of the results of the convolutions
    convolved = sum(size**2 * 25 * (96 if k else 1) * 96 for k, size in enumerate(sizes))
    # each pixel of its input is multiplied with all weights of a transposed one
    transposed = sum(size**2 * 25 * 96 * (96 if k < 4 else 1) for k, size in enumerate(reversed(sizes)))
    assert operations.products(REDCNN(), (1, 1, 30, 30)) == convolved + transposed
    assert operations.products(FFDNet(4, 2), (1, 3, 8, 8), (1, 1, 4, 4)) == 16 * 9 * (13 * 4 + 4 * 4)


# images


def test_a_turn_holds_no_more_than_a_site() -> None:
    """PyTorch in it would count as the pipeline's memory."""
    folder = str(Path(turn.__file__).parent)
    program = f"import sys; sys.path.insert(0, {folder!r}); import turn; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_quality_is_the_mean_over_slices_and_over_series() -> None:
    truth = np.zeros((2, 16, 16), np.float32)
    off = truth.copy()
    off[0] += 40  # a tenth of 400 HU: 20 dB
    off[1] += 4
    one = images.Quality.of(off, truth)
    assert images.WINDOWS == (SOFT_TISSUE, LUNG)
    assert one.psnr_db == pytest.approx((30, 30 + 20 * np.log10(1400 / 400)))
    both = images.Quality.mean([one, images.Quality((32.0, 50.0), (1.0, 1.0))])
    assert both.psnr_db == pytest.approx((31, (one.psnr_db[1] + 50) / 2))
    assert both.lpips is None
    assert images.loss(both, one) == pytest.approx([1, (50 - one.psnr_db[1]) / 2])


def test_a_series_to_and_fro(tmp_path: Path) -> None:
    hu = phantom(4, 96)
    source = tmp_path / "source"
    write_series(source, hu, spacing_mm=(2.5, 0.7, 0.7))
    paths = ct_files.repeated(source, tmp_path / "long", 9)
    made = read_volume(paths)
    np.testing.assert_array_equal(made.hu, hu[[0, 1, 2, 3, 2, 1, 0, 1, 2]])
    np.testing.assert_allclose(np.diff(made.positions_mm), 2.5, atol=1e-6)
    assert len(set(made.slice_uids)) == 9
    assert made.slice_paths == tuple(paths)
    assert read_volume(paths[:5]).hu.shape == (5, 96, 96)
    assert 0.3 < ct_files.body_part(paths) <= 1


# tables


def test_a_row_of_table_1() -> None:
    one = SimpleNamespace(label="net", products=150_000_000_000)
    quality = {"fp32": images.Quality((40.0, 50.0), (0.9, 0.95)), "int8": images.Quality((39.95, 49.9), (0.9, 0.95))}
    # 494 GMAC take the eager network 8 s here, and 6.587 s at 75 GMAC/s
    cells = table1.row(one, ("OpenVINO", "int8"), [0.5, 0.4, 0.6], (8.0, 494_000_000_000), 600.0, quality)
    row = dict(zip(table1.HEAD, cells, strict=True))
    assert row["seconds"] == "0.500 [0.400-0.600]"
    assert (row["× eager SRResNet3D"], row["× the same at 75 GMAC/s"]) == ("16.00", "13.17")
    assert (row["GMAC/s"], row["% of peak"]) == ("300", "50")
    assert (row["PSNR (dB)"], row["loss (dB)"]) == ("39.95 / 49.90", "0.050 / 0.100")
    assert table1.row(one, ("OpenVINO", "int8"), [0.5], (8.0, 1), 0.0, {})[-5:] == ["-"] * 5


def test_a_row_of_the_papers() -> None:
    measured = {
        turn.Form("net", "fp32"): [turn.MeasuredSlices(2.0, 100.0)],
        turn.Form("net", "int8"): [
            turn.MeasuredSlices(0.5, 90.0),
            turn.MeasuredSlices(0.4, 95.0),
            turn.MeasuredSlices(0.6, 80.0),
        ],
    }
    cells = papers.row(turn.Form("net", "int8"), 60_000_000_000, measured, 480.0, {})
    row = dict(zip(papers.HEAD, cells, strict=True))
    assert (row["GMAC a slice"], row["× fp32"], row["% of peak"], row["peak memory (MB)"]) == (
        "60.0",
        "4.00",
        "25",
        "95",
    )
    assert row["loss (dB)"] == "-"


def test_a_line_through_times_finds_a_knee() -> None:
    counts = [50, 100, 400, 1500]
    assert series.line(counts, [2 + 0.1 * n for n in counts]) == pytest.approx((2, 0.1, 0), abs=1e-9)
    assert series.line(counts, [2 + 0.1 * n + 0.1 * max(n - 400, 0) for n in counts])[2] > 0.05


def measured(seconds: float, peak_mb: float = 100.0) -> Any:
    stages = {"read": 1.0, "network": seconds - 1, "guard": 1.0, "write": 2.0, "wall": seconds}
    return turn.Measured(stages, peak_mb, (512, 512), (256, 512))


def test_what_slices_and_cores_cost() -> None:
    def case(slices: int, cores: int) -> Any:
        return turn.Case("net", "int8", "body", slices, cores)

    told = series.findings(
        {
            case(50, 2): [measured(6.0, 100)],
            case(100, 2): [measured(11.0, 110)],
            case(200, 2): [measured(21.0, 105)],
            case(200, 1): [measured(40.0)],
        }
    )
    assert told == [
        "net in int8, body, 2 cores: 1.0 s and 100.0 ms a slice; no time is farther than 0% from that. "
        "Memory 100 to 110 MB.",
        "net in int8, body, 200 slices: 2 cores are 1.90 times as fast as 1.",
    ]
    row = dict(zip(series.HEAD, series.row(case(200, 2), [measured(20), measured(22), measured(21)], 7.0), strict=True))
    assert (row["seconds"], row["ms a slice"], row["network (s)"]) == ("21.0 [20.0-22.0]", "105", "20.0")
    assert (row["computed"], row["floor of seconds"]) == ("50%", "33%")


@pytest.mark.parametrize(("skips", "most"), [("fp32", "2147 at most: met"), ("bf16", "1611 at most: missed")])
def test_a_bar_is_judged_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch, skips: str, most: str) -> None:
    monkeypatch.setattr(series, "float_of", lambda precision: skips)

    def case(pipeline: str, voxels: str, slices: int = 300, cores: int = 2) -> Any:
        return turn.Case(pipeline, "int8", voxels, slices, cores)

    one = turn.Measured({"wall": 41.0}, 2147.0, (512, 512), (300, 400))
    cases = {
        case("st3d", "body"): [one],
        case("st3d", "all"): [one],
        case("fast-2.5d", "all"): [one],
        case("fast-2.5d", "body"): [one],
        case("st3d", "all", slices=200): [one],
        case("st3d", "all", cores=1): [one],
    }
    told = series.bars(cases, 0.5)
    assert told == [
        "st3d, body: 41.0 s of 40 at most: missed.",
        "st3d, all: 41.0 s of 60 at most: met.",
        "fast-2.5d, all: 41.0 s of 25 at most: missed.",
        f"st3d: 2147 MB of {most}.",
        "fast-2.5d: 2147 MB of 2147 at most: met.",
    ]
    assert series.bars(cases, 0.44) == told[1:]  # little body is little work
    hungry = {case("drl", "all"): [replace(one, peak_mb=2148.0)]}
    assert series.bars(hungry, 0.5) == ["drl: 2148 MB of 2147 at most: missed."]
    assert series.bars({replace(first, precision="fp32"): turns for first, turns in hungry.items()}, 0.5) == []


def test_one_artefact_must_meet_the_whole_bar_of_table_1() -> None:
    def row(kind: str, loss: str, part: str, ratio: str) -> list[str]:
        return ["net", "OpenVINO", kind, "1", "20", ratio, "400", part, "40 / 50", loss, "1 / 1", "-"]

    good = row("int8", "0.020 / 0.100", "80", "11.00")
    others = [
        row("bf16", "0.000 / 0.000", "99", "20.00"),
        row("int8", "0.020 / 0.101", "99", "20.00"),
        row("int8", "0.020 / 0.030", "79", "20.00"),
        row("int8", "0.020 / 0.030", "99", "10.99"),
        row("int8", "-", "99", "20.00"),
    ]
    assert table1.bar(others, 3).endswith(": missed.")
    assert table1.bar([*others, good], 3).endswith(": met by net, OpenVINO.")
    assert table1.bar([good], 2).endswith(": missed.")  # of too few series


def test_slow_opponents_are_scaled_and_marked() -> None:
    ours, theirs, nlm = versus.Way("net", True, "int8"), versus.Way("net", False), versus.Way("nlm", False)
    times, computed = {ours: [30.0, 32.0, 28.0], theirs: [16.0], nlm: [8.0]}, {ours: 54, theirs: 54, nlm: 16}
    scaled = "16 slices, scaled to 300"
    rows = versus.rows(times, 300, 16, computed, {ours: (40.0, 50.0)})
    assert rows == [
        ["ours, net, int8", "30.0 [28.0-32.0]", "300 slices", "1.0", "40.00 / 50.00"],
        ["net, eager PyTorch and pydicom", "300.0 [300.0-300.0]", f"{scaled} (54 computed for them)", "10.0", "-"],
        ["non-local means, scikit-image", "150.0 [150.0-150.0]", scaled, "5.0 (the quickest)", "-"],
    ]


# what is timed is what it says


@pytest.mark.parametrize("kind", [SRResNet3D, STResNet])
def test_a_tile_at_once_is_what_a_node_streams(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table1, "TILE", (4, 12, 16))
    monkeypatch.setattr(table1, "FEATURES", 8)
    monkeypatch.setattr(table1, "BLOCKS", 1)
    tile = np.random.default_rng(0).normal(0, 0.1, table1.TILE).astype(np.float32)
    (one,) = (one for one in table1.found(["st3d-wide"], tmp_path, tile) if one.kind is kind)
    assert "left out: there are no weights of 'st3d-wide'" in capsys.readouterr().err  # random ones stand in
    assert "random weights" in one.label
    exact = table1.eager(one, tile)()
    changed = float(np.abs(exact - tile).max())
    for precision, within in (("fp32", 1e-5), ("int8", 0.05)):
        whole = table1.whole(one, precision, tile, 1)()
        streamed = table1.streamed(one, precision, tile, 1)()
        assert np.abs(whole - exact).max() < within * changed
        assert np.abs(streamed - whole).max() < within * changed


def test_what_is_timed_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: both ways through the network agree, types round, and an iteration teaches in both of its types."""
    monkeypatch.setattr(table1, "FEATURES", 6)
    monkeypatch.setattr(table1, "BLOCKS", 1)
    small = {name: replace(table1_gpu.recipe(name), patch_zyx=(3, 8, 8), batch=2) for name in table1.PAPER}
    monkeypatch.setattr(table1_gpu, "recipe", small.__getitem__)
    tile = np.random.default_rng(0).normal(0, 0.1, (4, 12, 16)).astype(np.float32)
    turns = table1_gpu.prepare(tile, "cpu", tmp_path)
    assert len(turns) == 2 * (2 * 3 + 2)
    for name, kind in zip(table1.PAPER, (SRResNet3D, STResNet), strict=True):
        network = table1.filled(kind, table1.random_weights(kind))
        exact = network(torch.from_numpy(tile)[None, None])[0, 0].numpy()
        for how in (table1_gpu.WHOLE, table1_gpu.STREAMED):
            np.testing.assert_allclose(turns[name, how, "fp32"](), exact, atol=1e-5)
            off = [float(np.abs(turns[name, how, kind]() - exact).max()) for kind in ("bf16", "fp16")]
            assert 0.02 > off[0] > off[1] > 1e-6
        losses = [[turns[name, table1_gpu.TRAINED, kind]() for _ in range(3)] for kind in ("fp32", "mixed, bf16")]
        assert all(len(set(each)) > 1 for each in losses)  # of one batch: the weights move
        assert 0 < abs(losses[0][0] - losses[1][0]) < 0.01 * losses[0][0]


def test_a_row_of_table_1_on_a_gpu() -> None:
    times = {(table1.PAPER[0], "whole tile", "fp32"): [0.4], (table1.PAPER[1], "whole tile", "fp32"): [0.2]}
    told = table1_gpu.rows({**times, (table1.PAPER[1], "whole tile", "fp16"): [0.05, 0.04, 0.06]})
    assert told[2] == ["st3d-wide", "whole tile", "fp16", "0.0500 [0.0400-0.0600]", "8.00", "4.00"]


def test_a_script_for_volumes_is_given_what_its_slices_depend_on() -> None:
    paths = [Path(str(k)) for k in range(300)]
    assert versus.around("nlm", paths, 16, versus.WEIGHTS) == (paths[142:158], 0)
    given, before = versus.around("st3d", paths, 16, versus.WEIGHTS)
    assert (given, before) == (paths[123:177], 19)


def test_the_eager_opponent_computes_the_network_slice_by_slice() -> None:
    card = ModelCard(
        "fast-2.5d", "1", "", "", "slab3", (1, 64, 64), (1, 21, 21), (-1024.0, 4000.0), "fp32", "", noise_map=True
    )
    torch.manual_seed(0)
    network = FFDNet(4, 3).eval()
    hu = phantom(3, 21).astype(np.float32)  # an odd size is brought up to the stride
    with torch.inference_mode():
        made = versus.by_eager("fast-2.5d", network, card)(hu, 0.7)
        padded = torch.from_numpy(np.pad(hu, ((0, 0), (0, 1), (0, 1)), mode="symmetric") / 1000)
        level = float(versus.noise_level(hu, np.zeros(hu.shape, np.bool_), 0.7)) / 1000
        last = network(padded[[1, 2, 2]][None], torch.full((1, 1, 11, 11), level))[0, 0, :21, :21].numpy() * 1000
    assert made.shape == hu.shape
    np.testing.assert_allclose(made[2], last, atol=1e-3)
