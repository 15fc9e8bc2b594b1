from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import tiny_settings

from selfcascade.adaptation.adapt import adapt, plan_adaptation
from selfcascade.adaptation.tensorboard_log import TensorBoardLog, check_tensorboard
from selfcascade.config import UpsamplerSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store, resolve


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_a_run_is_in_the_folder_and_the_artifact_knows_nothing_of_it(world: Store, tiny_base: Path, tmp_path: Path) -> None:
    """Every step's loss, every validation by bin, speed, memory and the preview; the address and the objects of the artifact are those of a run without."""
    plain = tiny_settings(tiny_base, name="board", previews=1, validation_steps=3, upsampler=UpsamplerSettings(variant="C"), seed=3)
    settings = plain.model_copy(update={"tensorboard": tmp_path / "board"})
    assert plan_adaptation(plain, world).ref == plan_adaptation(settings, world).ref
    ref = adapt(settings, world)
    found = events(tmp_path / "board" / f"board-{ref.version[:12]}")
    assert {*found.Tags()["scalars"]} == {
        *(f"train/{name}" for name in ("loss", "lr", "grad_norm")),
        *("speed/samples_per_second", "memory/peak_mib", "validation"),
        *(f"validation/{name}" for name in ("t0_139", "t140_279", "t280_419", "t420_559", "t560_699")),
    }
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in found.Scalars("validation")] == [3, 6]
    assert found.Scalars("train/lr")[0].value == pytest.approx(5e-3)
    counts = resolve(world, "upsamplers/board").manifest().counts
    assert found.Scalars("validation/t140_279")[-1].value == pytest.approx(counts["validation_t140_279"], abs=1e-5)
    [picture] = found.Images("previews")
    assert picture.step == 4
    with Image.open(io.BytesIO(picture.encoded_image_string)) as image:
        assert image.width > 2 * 128
    assert not [entry.key for entry in resolve(world, "upsamplers/board").manifest().objects if "events" in entry.key]


def test_steps_that_were_lost_are_not_shown_twice(tmp_path: Path) -> None:
    """A run that goes on at step 2 hides what the one before it wrote of steps 3 and 4."""
    settings = tiny_settings("b", tensorboard=tmp_path)
    with TensorBoardLog(settings, version="a" * 64, step=0) as board:
        for step in range(1, 5):
            board.scalars(step, {"train/loss": float(step)})
    with TensorBoardLog(settings, version="a" * 64, step=2) as board:
        for step in range(3, 6):
            board.scalars(step, {"train/loss": 10.0 * step})
    found = events(tmp_path / f"tiny-{'a' * 12}").Scalars("train/loss")
    assert [(event.step, event.value) for event in found] == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(buffer, "PNG")
    with TensorBoardLog(tiny_settings("b"), version="a" * 64, step=0) as board:
        board.scalars(1, {"train/loss": 1.0})
        board.picture(1, "previews", buffer.getvalue())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_or_a_folder_that_cannot_be_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"adaptation\.tensorboard=\S+/file cannot be written \(.+\); choose another folder"):
        TensorBoardLog(tiny_settings("b", tensorboard=tmp_path / "file"), version="a" * 64, step=0)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SettingsError, match=r"needs the package tensorboard; install it with pip install 'selfcascade\[tensorboard\]'"):
        check_tensorboard(tiny_settings("b", tensorboard=tmp_path))
    check_tensorboard(tiny_settings("b"))
