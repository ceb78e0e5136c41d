"""Training from the command line, as small as it goes: phantoms, the Mayo Clinic's layout, one subject left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ct_builder import edit, write_series
from safetensors.torch import load_file

from pipelines.base import WeightsDamaged
from pipelines.ffdnet import FFDNet
from pipelines.runtime import WEIGHTS, read_card
from pipelines.torch_engine import load_network
from pipelines.volume import read_volume
from training import train
from training.__main__ import main
from training.card import Plateau, Source, TrainingRecord, write_network
from training.export import export
from training.features import WeightsMissing
from training.loop import Run
from training.recipes import Recipe, recipe
from training.simulation import simulated_series
from training.sources import scans, splits
from training.sources.layouts import Case, find


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "PHANTOM_SLICES", 3)
    monkeypatch.setattr(train, "VALIDATION_BATCHES", 1)
    monkeypatch.setattr(train, "VALIDATION_PHANTOMS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def small(name: str) -> Recipe:
        how = recipe(name)
        return replace(how, patch_zyx=(how.patch_zyx[0], 32, 32), batch=4)

    monkeypatch.setattr(train, "recipe", small)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Keeps the phantoms, which take longest: they are made once."""
    return str(tmp_path_factory.mktemp("store"))


def _challenge(subject: str, quarter: bool, number: int) -> Path:
    """Where the Grand Challenge has an image."""
    name = f"{subject}_{'QD' if quarter else 'FD'}_3_1.CT.0004.{number:04d}.IMA"
    return Path(subject, "quarter_3mm" if quarter else "full_3mm", name)


def _tcia(subject: str, quarter: bool, number: int) -> Path:
    """Where LDCT-and-Projection-data has an image."""
    dose = "Low" if quarter else "Full"
    return Path(subject, "12-23-2021-NA-NA-1", f"1.000000-{dose} Dose Images-7158{quarter:d}", f"1-{number:03d}.dcm")


def _pairs(root: Path, subjects: list[str], place: Callable[[str, bool, int], Path] = _challenge) -> Path:
    """Real pairs in small: smooth full-dose images, and the same with noise."""
    for k, subject in enumerate(subjects):
        rng = np.random.default_rng(k)
        y, x = np.indices((112, 112))
        disc = np.hypot(y - 56, x - 56) < 50
        full = np.where(disc, 40.0 + 10 * np.sin(x / 9 + k), -1000.0)[None].repeat(4, 0)
        for quarter, hu in ((False, full), (True, full + rng.normal(0, 25, full.shape))):
            elements = {"PatientID": subject, "PixelSpacing": [3.0, 3.0]}
            written = write_series(root / "new", np.round(hu), name=f"{subject} {quarter}", **elements)
            for n, path in enumerate(written):
                (root / place(subject, quarter, n)).parent.mkdir(parents=True, exist_ok=True)
                path.rename(root / place(subject, quarter, n))
    (root / "new").rmdir()
    return root


def test_train_writes_weights_and_a_card_that_load(tmp_path: Path, store: str) -> None:
    out = tmp_path / "secret folder" / "run"
    words = ["--out", str(out), "--steps", "2", "--phantoms", "1", "--seed", "7", "--store", store]
    main(["train", "fast-2.5d", *words])
    card = read_card("fast-2.5d", out)
    load_network(FFDNet(), card, out)
    assert all(t.dtype == torch.float16 for t in load_file(out / "fast-2.5d.safetensors").values())
    written = json.loads((out / "fast-2.5d.json").read_text(encoding="utf-8"))
    training = written["training"]
    assert (training["steps"], training["samples"], training["seed"]) == (2, 8, 7)
    assert card.patch_zyx == (3, 32, 32)  # those that were cut
    assert training["plateau"]["reached"] is False
    assert training["validated_on"] == "1 phantoms that did not teach: it says nothing of images of patients"
    assert re.fullmatch(r"([0-9a-f]{40}\+?)?", training["commit"])
    assert "--out run --steps 2 --phantoms 1 --seed 7 --store store" in training["command"]
    assert "secret" not in json.dumps(written)
    assert card.version == card.weights_sha256[:8]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("place", [_challenge, _tcia])
def test_a_user_with_real_pairs_gets_a_trained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: Callable[[str, bool, int], Path]
) -> None:
    """Real pairs are found, a subject is kept for validation, and the noise really falls."""
    root = _pairs(tmp_path / "data", [f"L{k:03d}" for k in range(10, 15)], place)
    out = tmp_path / "run"
    words = ["--data", str(root), "--phantoms", "0", "--steps", "250", "--out", str(out), "--workers", "1"]
    main(["train", "fast-2.5d", *words])
    assert "4 scans to learn from, 1 to validate on" in capsys.readouterr().out
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log[-1]["validation_gain_db"] > 0.5
    card = json.loads((out / "fast-2.5d.json").read_text(encoding="utf-8"))
    assert len(card["training"]["series"]) == card["training"]["pairs"] == 4
    assert card["training"]["series"][0]["licence"] == "not stated"
    assert card["training"]["validated_on"] == "1 series of subjects that did not teach"
    assert (card["training"]["slice_spacing_mm"], card["training"]["pixel_spacing_mm"]) == ([2.0, 2.0], [3.0, 3.0])


def test_series_without_a_partner_teach_by_simulated_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders of a PACS, two series of one patient among them: who teaches does not validate."""
    y, x = np.indices((96, 96)) - 47.5
    body = np.where(np.hypot(x, y) < 38, 40.0, -1000.0)
    for k, name in enumerate(("one-soft", "one-sharp", "other-soft")):
        noise = np.random.default_rng(k).normal(0, 10, (4, 96, 96))
        elements = {"PatientID": f"4711-{name[:3]}", "PixelSpacing": [3.0, 3.0]}
        write_series(tmp_path / "data" / name, np.round(body + noise), name=name, **elements)
    out = tmp_path / "run"
    main(["train", "fast-2.5d", "--data", str(tmp_path / "data"), "--phantoms", "0", "--steps", "2", "--out", str(out)])
    cases = {case.name: case.subject for case in find(tmp_path / "data")}
    text = (out / "fast-2.5d.json").read_text(encoding="utf-8")
    training = json.loads(text)["training"]
    shown = {source["name"] for source in training["series"]}
    held = set(cases) - shown
    assert len({cases[name] for name in shown}) == len({cases[name] for name in held}) == 1
    assert {cases[name] for name in shown}.isdisjoint(cases[name] for name in held)
    assert f"{len(shown)} scans to learn from, {len(held)} to validate on" in capsys.readouterr().out
    assert (training["pairs"], training["phantoms"]) == (0, 0)
    assert f"{len(shown)} real series with simulated quantum noise added (0.04 to 0.4 of their dose)." in text
    assert "4711" not in text + (out / "log.jsonl").read_text(encoding="utf-8")


def test_who_is_named_validates_and_what_the_table_teaches_is_not_drawn() -> None:
    ours = [Case(entry.patient, entry.series_uid, (), None, None, "", 1.0) for entry in splits.table() if entry.target]
    theirs = [Case(subject, name, (), None, None, "", 1.0) for subject, name in ("a1", "a2", "b1")]
    assert train.divided([*ours, *theirs], ["a"]) == ([*ours, theirs[2]], theirs[:2])
    assert train.divided([*ours, *theirs], ["b", ours[0].subject]) == ([*ours[1:], *theirs[:2]], [ours[0], theirs[2]])
    teach, check = train.divided([*ours, *theirs], [])
    assert check in (theirs[:2], theirs[2:])
    assert teach == [case for case in (*ours, *theirs) if case not in check]
    assert train.divided(ours, []) == (ours, [])


def test_a_training_that_was_stopped_goes_on_by_the_same_command(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    whole = Run.train

    def stopped(run: Run, saved_too: Callable[[], None]) -> torch.nn.Module:
        def stop() -> None:
            saved_too()
            raise Stopped

        return whole(run, stop, checkpoint_minutes=0)

    def again(out: Path) -> tuple[int, bytes, bytes]:
        words = ["--out", str(out), "--steps", "3", "--phantoms", "1", "--seed", "7", "--store", store]
        main(["train", "fast-2.5d", *words])
        card = json.loads((out / "fast-2.5d.json").read_text(encoding="utf-8"))
        return card["training"]["steps"], (out / "fast-2.5d.safetensors").read_bytes(), (out / "log.jsonl").read_bytes()

    with monkeypatch.context() as patched:
        patched.setattr(Run, "train", stopped)
        with pytest.raises(Stopped):
            again(tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "fast-2.5d.json").read_text(encoding="utf-8"))["training"]["steps"] == 1
    steps, weights, log = again(tmp_path / "parts")
    at_once = again(tmp_path / "whole")
    assert (steps, weights) == at_once[:2] == (3, weights)
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 2, 3]
    assert again(tmp_path / "parts") == (steps, weights, log)  # at its end, nothing is trained


def test_leave_one_out_trains_once_without_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _pairs(tmp_path / "data", ["L010", "L011", "L012", "L013"])
    for path in (root / "L013" / "quarter_3mm").iterdir():
        edit(path, lambda ds: setattr(ds, "PixelSpacing", [2.0, 2.0]))
    out = tmp_path / "folds"
    main(
        [
            "train",
            "fast-2.5d",
            "--data",
            str(root),
            "--phantoms",
            "0",
            "--steps",
            "1",
            "--leave-one-out",
            "--out",
            str(out),
        ]
    )
    text = (out / "folds.md").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert text in said
    assert "L013: not left out, as none of its series can be measured\n" in said
    assert not (out / "L013").exists()
    assert "| **mean ± SD of 3 subjects** |" in text
    for subject in ("L010", "L011", "L012"):
        assert f"| {subject} | {subject} STANDARD 2 mm | 4 |" in text
        names = {s["name"] for s in json.loads((out / subject / "fast-2.5d.json").read_text())["training"]["series"]}
        assert len(names) == 2
        assert not any(subject in name for name in names)


def _first_stage(folder: Path, *taught: str) -> None:
    """An untrained DRL whose card says that it was trained on `taught`."""
    series = tuple(Source(f"{subject} STANDARD 2 mm", "", "", "", "") for subject in taught)
    at_rest = Plateau(0.0, True)
    record = TrainingRecord(
        "", "", "", "", 1, 0.0, 1, 1, "", 0, series, len(series), at_rest, (2.0, 2.0), (3.0, 3.0), ""
    )
    folder.mkdir(parents=True)
    how = recipe("drl")
    write_network(folder, {**how.card, "patch_zyx": how.patch_zyx}, how.network(), record)


def test_each_fold_of_a_second_stage_begins_with_a_first_one_that_never_saw_it(tmp_path: Path) -> None:
    root = _pairs(tmp_path / "data", ["L010", "L011"])
    out, first = tmp_path / "folds", tmp_path / "first"
    words = ["--data", str(root), "--phantoms", "0", "--steps", "1", "--out", str(out), "--start", str(first)]
    words = ["train", "cascade", *words, "--leave-one-out"]
    _first_stage(first / "L010", "L011")
    with pytest.raises(SystemExit, match=r"there is none in .*first for L011. Train drl with --leave-one-out first"):
        main(words)
    assert not out.exists()
    _first_stage(first / "L011", "L010")
    main(words)
    for subject in ("L010", "L011"):
        card = json.loads((out / subject / "cascade.json").read_text(encoding="utf-8"))
        assert card["training"]["began_with"] == f"drl {read_card('drl', first / subject).version}"
        with pytest.raises(SystemExit, match=f"was trained on {'L011' if subject == 'L010' else 'L010'} STANDARD"):
            train.begun_without("drl", first / subject, [case for case in find(root) if case.subject != subject])


def test_series_kept_for_tests_are_never_taught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["philips-brilliance16-lungdxA0001-B-5mm", "ge-lightspeed16-rider-chestpe-1p25mm", "of the user"]
    files = tuple(write_series(tmp_path, np.zeros((1, 8, 8))))
    cases = [Case(name, name, files, None, None, "", 1.0) for name in names]
    assert [case.name for case in train.taught(cases)] == [names[0], names[2]]
    assert f"{names[1]}: left out, test." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "taught"),
    [
        ({}, True),
        ({"PatientID": "kept"}, False),  # a further series of the patient
        ({"StudyInstanceUID": "1.2.3.4"}, False),  # the same study, under another PatientID
        ({"PatientID": "taught"}, True),
    ],
)
def test_other_series_of_a_patient_kept_for_tests_are_never_taught(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    taught: bool,
) -> None:
    for patient in ("kept", "taught"):
        write_series(tmp_path / patient, np.zeros((2, 8, 8)), PatientID=patient)
    known = {patient: find(tmp_path / patient)[0].subject for patient in ("kept", "taught")}
    assert "kept" not in known.values()
    entry = splits.Entry("a name", "1.1", "1.2.3.4", "subject", known["kept"], "test", False, "Whom no training sees.")
    other = replace(entry, series_uid="1.2", study_uid="1.2.3.5", patient=known["taught"], role="train", target=True)
    monkeypatch.setattr(splits, "table", lambda: (other, entry))
    write_series(tmp_path / "data", np.zeros((2, 8, 8)), name="further", **changes)
    cases = find(tmp_path / "data")
    assert train.taught(cases) == (cases if taught else [])
    told = f"{cases[0].name}: left out, of the patient of a name: test. Whom no training sees.\n"
    assert capsys.readouterr().out == ("" if taught else told)


def test_a_simulated_low_dose_is_no_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_series(tmp_path / "data" / "own", np.zeros((2, 8, 8)))
    volume = read_volume(files)
    simulated_series.write_series(volume, volume.hu, 0.25, "made", tmp_path / "data" / "made")
    (taught,) = train.taught(find(tmp_path / "data"))
    assert set(taught.full) == set(files)
    assert "left out, a low dose that `simulate` made" in capsys.readouterr().out


def test_a_series_that_is_refused_stops_no_training(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _pairs(tmp_path / "data", ["L010", "L011"])
    for path in (root / "L011" / "quarter_3mm").iterdir():
        edit(path, lambda ds: setattr(ds, "PixelSpacing", [2.0, 2.0]))
    words = ["--data", str(root), "--phantoms", "1", "--steps", "1", "--out", str(tmp_path / "run")]
    words += ["--store", store, "--seed", "7"]
    with pytest.raises(SystemExit, match="no subject nobody among the data; there are: L010, L011"):
        main(["train", "fast-2.5d", *words, "--leave-out", "nobody"])
    main(["train", "fast-2.5d", *words])
    said = capsys.readouterr().out
    assert "L011 STANDARD 2 mm: left out. " in said
    assert "2 scans to learn from" in said  # a phantom and L010


def test_a_network_of_unknown_slice_distance_is_not_trained(tmp_path: Path, store: str) -> None:
    """Its card could not say for which series it is valid."""
    root = tmp_path / "data"
    for quarter, hu in ((False, 40.0), (True, 45.0)):
        (path,) = write_series(root / "new", np.full((1, 96, 96), hu), name=f"{quarter}", SliceThickness=None)
        (root / _challenge("L010", quarter, 0)).parent.mkdir(parents=True)
        path.rename(root / _challenge("L010", quarter, 0))
    words = ["--data", str(root), "--phantoms", "0", "--steps", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="give series of more than one slice"):
        main(["train", "dcscn", *words, "--store", store])


@pytest.mark.parametrize("words", [["--steps", "0"], ["--z-target-mm", "0"], ["--z-target-mm", "nan"]])
def test_numbers_out_of_range_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "dcscn", "--out", "run", *words])
    assert f"argument {words[0]}:" in capsys.readouterr().err


def test_features_are_for_recipes_that_compare_them(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LDCT_VGG_WEIGHTS", raising=False)
    words = ["--phantoms", "0", "--steps", "1", "--data", str(_pairs(tmp_path / "data", ["L010"]))]
    words += ["--store", store]
    with pytest.raises(SystemExit, match="dcscn compares no features"):
        main(["train", "dcscn", "--out", str(tmp_path / "a"), *words, "--features", "random"])
    with pytest.raises(WeightsMissing, match="vgg16"):
        main(["train", "drl", "--out", str(tmp_path / "b"), *words, "--features", "vgg16"])
    main(["train", "drl", "--out", str(tmp_path / "c"), *words, "--features", "random"])
    assert (tmp_path / "c" / "drl.safetensors").exists()


def test_a_training_names_what_it_learns_from(tmp_path: Path) -> None:
    noisy, other, third = (np.full((3, 8, 8), value, np.float16) for value in (1, 2, 3))
    scan = scans.Scan("a", "a", noisy, noisy, (other,), 0.0, 0.0, (8.0,))
    moved = replace(scan, source=third)
    assert replace(scan, target=noisy.copy()).digest() == scan.digest()
    changed = [moved, replace(scan, noises=(third,)), replace(scan, noise_hu=(9.0,)), replace(scan, subject="b")]
    assert len({scan.digest(), *(one.digest() for one in changed)}) == 5

    def told(name: str, shown: list[scans.Scan], z_target_mm: float | None = None) -> dict[str, str]:
        how = recipe(name)
        return train.sources(shown, [scan], how.loss(), how, WEIGHTS, z_target_mm)

    assert told("dcscn", [scan, moved])["scans"] != told("dcscn", [moved, scan])["scans"]
    assert told("dcscn", [scan])["validation scans"] == told("dcscn", [scan])["scans"]
    assert set(told("dcscn", [scan])) == {"scans", "validation scans"}
    assert told("dcscn", [scan], 1.0)["slice distance"] == "1 mm"
    assert re.fullmatch("ct-ae [0-9a-f]{64}", told("drl", [scan])["features"])
    assert told("cascade", [scan])["first weights"] == f"drl {read_card('drl').weights_sha256}"


def test_export_installs_what_belongs_together(tmp_path: Path, store: str) -> None:
    out = tmp_path / "run"
    words = ["--out", str(out), "--steps", "1", "--phantoms", "1", "--seed", "7", "--store", store]
    main(["train", "fast-2.5d", *words, "--z-target-mm", "1"])
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "fast-2.5d.int8.bin").write_bytes(b"of other weights")
    main(["export", str(out), "--weights", str(tmp_path / "weights"), "--logs", str(tmp_path / "logs")])
    assert not list((tmp_path / "weights").glob("*.int8.*"))
    load_network(FFDNet(), read_card("fast-2.5d", tmp_path / "weights"), tmp_path / "weights")
    assert (tmp_path / "logs" / "fast-2.5d.jsonl").read_bytes() == (out / "log.jsonl").read_bytes()
    (out / "fast-2.5d.safetensors").write_bytes(b"something else")
    with pytest.raises(WeightsDamaged, match="start the training again"):
        export(out, tmp_path / "weights", tmp_path / "logs")
    with pytest.raises(FileNotFoundError, match="holds no card"):
        export(tmp_path, tmp_path / "weights", tmp_path / "logs")
    with pytest.raises(SystemExit, match="name the folder that `train --out` wrote"):
        main(["export"])


def test_what_a_card_says_of_the_plateau_is_of_the_whole_training(tmp_path: Path) -> None:
    """The first stage counts, what an older state of the code or of the loss trained does not, nor does a critic."""
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {k}, "validation_psnr_db": 30.0}}\n' for k in range(100, 4001, 100)))
    card = tmp_path / "drl.json"
    for first, reached in (
        ({}, False),
        ({"plateau": {"reached": False}}, False),
        ({"plateau": {"reached": True}}, True),
    ):
        card.write_text(json.dumps({"training": first}), encoding="utf-8")
        assert train.plateau(log, 4000, 0, recipe("cascade"), tmp_path).reached is reached
    assert train.plateau(log, 4000, 0, recipe("wgan"), tmp_path).reached is None
    stretches = [(0, "a"), (1500, "b"), (3900, "c")]
    assert train.same_since(stretches, recipe("st3d").loss(), 3200) == 2000  # the weight of lost contrast rises so long
    assert train.same_since(stretches, recipe("dcscn").loss(), 3200) == 1500
    assert train.same_since(stretches, recipe("dcscn").loss(), 4000) == 3900
