"""The weights that ship: they denoise a phantom that no training saw, and do as they are told."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import load_file

from pipelines.base import Options, Pipeline, denoise_volume, load
from pipelines.openvino_core import compile_model, convolution_precisions, cpu_supports
from pipelines.openvino_planes import read_graph
from pipelines.openvino_stream import StreamEngine
from pipelines.runtime import INT8_MAX_LOSS_DB, WEIGHTS, read_card, read_file, read_weights
from training.measuring.cases import volume_of
from training.measuring.model_page import measure
from training.measuring.uninstalled import factory_of
from training.recipes import recipe
from training.simulate import low_dose
from training.sources.phantom import chest_abdomen
from training.sources.splits import entry_of

Array = NDArray[np.float32]
PIXEL_MM = 0.75
MIDDLE = slice(96, 160)
"""Of rows and columns: inside the body, and of the golden volume's size, for which a stream is compiled when loaded."""
LEAST_GAIN_DB = 3.0
LEAST_GAIN_REDRAWN_DB = -0.5
"""Over the whole range, of the plain networks without a skip: they redraw the edges of bone and lung."""
REDRAWN = {"cnn-l1", "wgan"}
SHIPPED = sorted(path.stem for path in WEIGHTS.glob("*.json"))
CARDS = {name: json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8")) for name in SHIPPED}
QUANTISED = [name for name, card in CARDS.items() if "int8" in card]


@pytest.fixture(scope="module", params=SHIPPED)
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return load(request.param)


@pytest.fixture(scope="module")
def pair() -> tuple[Array, Array]:
    """Truth and quarter dose of a slab that no training saw; the body is wider than the image."""
    truth = chest_abdomen(6, 256, PIXEL_MM, 2.5, seed=910_001)
    return truth, low_dose(truth, PIXEL_MM, 0.25, seed=910_001)


def test_same_input_same_output_and_blend(pipeline: Pipeline, pair: tuple[Array, Array]) -> None:
    volume = volume_of(np.ascontiguousarray(pair[1][:3, MIDDLE, MIDDLE]), PIXEL_MM, 2.5)
    one, two, none, half = (denoise_volume(pipeline, volume, Options(blend=blend)) for blend in (1.0, 1.0, 0.0, 0.5))
    assert np.array_equal(one, two)
    assert np.array_equal(none, volume.hu)
    assert np.allclose(half, (one + volume.hu) / 2, atol=1e-3)


def test_shipped_weights_denoise(pipeline: Pipeline, pair: tuple[Array, Array]) -> None:
    truth, noisy = pair
    measured = measure(noisy, denoise_volume(pipeline, volume_of(noisy, PIXEL_MM, 2.5)), truth)
    (whole_before, whole_after), (soft_before, soft_after) = measured["psnr_db"].values()
    assert whole_after - whole_before > (LEAST_GAIN_REDRAWN_DB if pipeline.card.name in REDRAWN else LEAST_GAIN_DB)
    assert soft_after - soft_before > LEAST_GAIN_DB
    for name, tissue in measured["tissues"].items():
        if tissue["voxels"] > 1000:
            assert abs(tissue["mean_shift_hu"]) < 1, name
            assert tissue["error_sd_after_hu"] < tissue["error_sd_before_hu"], name


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_card_tells_how_its_weights_came_to_be(name: str) -> None:
    """Data, command, seed, commit, hours, hardware, what was measured, what was never tried; the weights in 16 bits."""
    card = json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))
    training = card["training"]
    assert training["command"].startswith(f"python -m training train {name} ")
    commits = [part.split(" from step ") for part in training["commit"].split(", ")]
    assert all(re.fullmatch(r"[0-9a-f]{40}\+?", commit) for commit, *_ in commits)
    steps = [int(begun[0]) for _, *begun in commits if begun]
    assert steps == sorted(set(steps))
    assert all(0 < step < training["steps"] for step in steps)
    assert training["seed"] >= 0
    assert training["hours"] > 0
    assert training["samples"] == training["steps"] * recipe(name).batch
    assert training["hardware"]
    assert training["plateau"]["reached"] in (True, False) or recipe(name).adversary
    for source in training["series"]:
        entry = entry_of(source["name"])
        assert entry is not None
        assert (entry.target, entry.study_uid) == (True, source.get("study_uid", entry.study_uid))
        assert all(source[key] for key in ("licence", "licence_status", "attribution"))
    assert all(card[key] for key in ("trained_on", "never_tried_on", "limits", "paper"))
    assert card["measured"]["command"].startswith("python -m training evaluate ")
    assert set(card["measured"]["tissues"]) == {"air", "lung", "fat", "soft", "bone"}
    weights = load_file(WEIGHTS / f"{name}.safetensors")
    assert {tensor.dtype for tensor in weights.values()} <= {np.dtype(np.float16), np.dtype(np.int64)}


def _runs_in(name: str) -> dict[str, str]:
    """What each convolution of the INT8 version runs in."""
    card, map_stride = read_card(name), factory_of(name).noise_map_stride
    if card.input == "volume":
        ranges = json.loads(read_file(card, "int8.ranges"))
        weights = load_tensors(read_weights(card))
        return StreamEngine(weights, (48, 48), precision="int8", ranges=ranges, threads=1).precisions
    model = read_graph(read_file(card, "int8.xml"), read_file(card, "int8.bin"))
    shapes = [[1, 1 if card.input == "slice" else 3, 64, 64], [1, 1, 64 // map_stride, 64 // map_stride]]
    model.reshape(dict(zip(model.inputs, shapes, strict=False)))
    return convolution_precisions(compile_model(model, "int8", 1))


@pytest.mark.skipif(not cpu_supports("int8"), reason="needs a CPU with VNNI")
@pytest.mark.parametrize("name", QUANTISED)
def test_int8_runs_in_8_bits_but_for_the_layers_that_the_card_names(name: str) -> None:
    """OpenVINO runs what it does not recognise in float, and says so nowhere else.

    A convolution without the name of a layer is a bilinear up-sampling, which has no weights to quantise.
    """
    kinds = {layer: kind for layer, kind in _runs_in(name).items() if " aten::" not in layer}
    in_float = [layer for layer, kind in kinds.items() if kind not in ("u8", "i8")]
    assert len(kinds) > len(in_float) == len(CARDS[name]["int8"]["float_layers"])


@pytest.mark.skipif(not cpu_supports("int8"), reason="needs a CPU with VNNI")
def test_int8_runs_where_it_ships_and_holds_its_bound(pipeline: Pipeline) -> None:
    """Were it farther from fp32 on the golden volume than its card allows, fp32 would have taken its place."""
    quantised = pipeline.card.name in QUANTISED
    assert (pipeline.card.precision == "int8") == quantised, pipeline.card.reason
    if quantised:
        here, bound = CARDS[pipeline.card.name]["int8"]["golden_hu"], pipeline.card.int8_bound_hu
        assert bound == (2 * here["max_hu"], 2 * here["rms_hu"])


@pytest.mark.parametrize("name", QUANTISED)
def test_int8_is_good_enough_to_run_by_itself(name: str) -> None:
    assert CARDS[name]["int8_loss_db"] == max(CARDS[name]["int8"]["loss_db"].values()) <= INT8_MAX_LOSS_DB


def test_strength_takes_more_or_less_away(pair: tuple[Array, Array]) -> None:
    pipeline = load("fast-2.5d")
    volume = volume_of(pair[1][:3], PIXEL_MM, 2.5)
    weak, normal, strong = (
        float(np.std(denoise_volume(pipeline, volume, Options(strength=s)) - volume.hu)) for s in (0.5, 1.0, 1.5)
    )
    assert weak < normal < strong


def test_a_clean_image_stays() -> None:
    y, x = np.mgrid[:128, :128] - 63.5
    disc = np.where(x * x + y * y < 50**2, 40, -1000).astype(np.float32)[None]
    out = denoise_volume(load("fast-2.5d"), volume_of(disc, PIXEL_MM, 2.5))
    assert float(np.abs(out - disc)[0, 30:98, 30:98].max()) < 2


def test_one_slice(pair: tuple[Array, Array]) -> None:
    truth, noisy = (np.ascontiguousarray(hu[:1, MIDDLE, MIDDLE]) for hu in pair)
    out = denoise_volume(load("st3d"), volume_of(noisy, PIXEL_MM, 2.5))
    assert float(np.std(out - truth)) < 0.9 * float(np.std(noisy - truth))
