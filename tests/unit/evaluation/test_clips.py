"""FVD and KVD: by hand from what the network says, whatever a clip is kept as; and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from selfcascade.config import ClipSettings, EvaluationSettings
from selfcascade.evaluation.clip_comparison import compare_clips
from selfcascade.evaluation.networks import i3d
from selfcascade.settings import SettingsError
from selfcascade_flows.cli import main


class _Narrow(nn.Module):
    """The interface of StyleGAN-V's file, its strides in time and 400 logits, of a few channels."""

    def __init__(self, logits: int = 400) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 6, (3, 9, 9), stride=(2, 8, 8), padding=(1, 0, 0))
        self.second = nn.Conv3d(6, 8, 3, stride=(2, 2, 2), padding=1)
        self.head = nn.Linear(8 * 2 * 9, logits)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if resize:
            x = nn.functional.interpolate(x, size=[x.shape[2], 224, 224], mode="trilinear", align_corners=False)
        if rescale:
            x = 2 * x / 255 - 1
        x = self.second(self.first(x).relu()).relu()
        features = self.head(nn.functional.adaptive_avg_pool3d(x, [2, 3, 3]).flatten(1))
        return features if return_features else features.softmax(dim=1)


def save_network(path: Path, logits: int = 400) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = _Narrow(logits)
        with torch.no_grad():
            network.head.weight.mul_(20)
        torch.jit.script(network).save(str(path))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_network(tmp_path_factory.mktemp("weights") / "i3d.pt")


@pytest.fixture
def settings(weights) -> EvaluationSettings:
    return EvaluationSettings(clips=ClipSettings(weights=weights, batch=4), half_samples=10)


def clips(count: int, *, seed: int, frames: int = 12, size: tuple[int, int] = (20, 28)) -> np.ndarray:
    """Colours that drift: (count, frames, *size, 3) uint8."""
    generator = np.random.default_rng(seed)
    start, drift = generator.uniform(0, 150, (count, 1, 1, 1, 3)), generator.uniform(0, 8, (count, 1, 1, 1, 3))
    noise = generator.normal(0, 10, (count, frames, *size, 3))
    return (start + drift * np.arange(frames)[:, None, None, None] + noise).clip(0, 255).astype(np.uint8)


def saved(path: Path, array: np.ndarray) -> str:
    """One array of all clips."""
    np.save(path, array)
    return str(path)


def features(weights: Path, array: np.ndarray) -> np.ndarray:
    """By the file alone, clip by clip, with its own resize."""
    script = torch.jit.load(str(weights))
    batch = torch.from_numpy(array).permute(0, 4, 1, 2, 3).float()
    with torch.inference_mode():
        return torch.cat([script(clip[None], rescale=True, resize=True, return_features=True) for clip in batch]).double().numpy()


def test_both_numbers_are_their_definitions(settings, weights, tmp_path):
    """FVD by SciPy's root of the covariances' product, KVD by sums over pairs, from what the file says of whole clips by its own resize."""
    one, other = clips(9, seed=1), clips(7, seed=2)
    found = compare_clips(settings, [saved(tmp_path / "one.npy", one), saved(tmp_path / "other.npy", other)], device="cpu")
    x, y = features(weights, one), features(weights, other)
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # Of singular matrices SciPy's root is exact to about 1e-3.
    root = np.real(np.trace(sqrtm(covariances[0] @ covariances[1] + 1e-9 * np.eye(400))))
    fvd = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 400 + 1) ** 3

    def within(z: np.ndarray) -> float:
        return float(np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]))

    kvd = within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    (row,) = found.rows
    assert (found.reference_count, row.count, found.frames) == (9, 7, 12)
    assert row.fvd == pytest.approx(fvd, rel=1e-2)
    assert row.kvd == pytest.approx(kvd, rel=1e-4)
    assert row.fvd > 0
    assert row.fvd_error > 0
    assert row.kvd_error > 0


def test_a_set_is_at_no_distance_from_itself(settings, tmp_path):
    name = saved(tmp_path / "one.npy", clips(8, seed=1))
    (row,) = compare_clips(settings, [name, name], device="cpu").rows
    assert row.fvd == pytest.approx(0, abs=1e-6)
    assert row.kvd <= 0  # unbiased: the pairs of a clip with itself are in the sum between the sets alone


def test_order_in_time_is_seen(settings, tmp_path):
    """The same frames, of every clip the other way round: to FID of frames nothing has changed."""
    forward = clips(8, seed=1)
    names = [saved(tmp_path / "forward.npy", forward), saved(tmp_path / "backward.npy", forward[:, ::-1])]
    (row,) = compare_clips(settings, names, device="cpu").rows
    assert row.fvd > 1e-3


def test_a_clip_does_not_depend_on_its_batch(settings, weights, tmp_path):
    names = [saved(tmp_path / f"{seed}.npy", clips(6, seed=seed)) for seed in (1, 2)]
    found = [compare_clips(settings.model_copy(update={"clips": ClipSettings(weights=weights, batch=batch)}), names, device="cpu").rows[0] for batch in (1, 4)]
    assert found[0].fvd == pytest.approx(found[1].fvd, rel=1e-5)
    assert found[0].kvd == pytest.approx(found[1].kvd, rel=1e-5)


def test_a_clip_is_the_same_however_it_is_kept(settings, tmp_path):
    """Folders of frames, arrays, animated WebP and PNG without loss, and clips of several sizes in one set."""
    array = clips(4, seed=1)
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "0").mkdir()
    for number, frame in enumerate(array[0]):
        Image.fromarray(frame).save(folder / "0" / f"{number:03d}.png")
    np.save(folder / "1.npy", array[1])
    for name, clip in (("2.webp", array[2]), ("3.png", array[3])):
        first, *rest = [Image.fromarray(frame) for frame in clip]
        first.save(folder / name, save_all=True, append_images=rest, lossless=True)
    reference = saved(tmp_path / "reference.npy", clips(5, seed=2, size=(40, 24)))
    names = [reference, saved(tmp_path / "array.npy", array), str(folder)]
    by_array, by_files = compare_clips(settings, names, device="cpu").rows
    assert (by_files.fvd, by_files.kvd, by_files.count) == (by_array.fvd, by_array.kvd, 4)
    np.save(folder / "4.npy", clips(1, seed=5, size=(60, 60))[0])
    assert compare_clips(settings, [reference, str(folder)], device="cpu").rows[0].count == 5


def test_what_was_seen_once_is_not_passed_again(settings, tmp_path, monkeypatch):
    passed: list[int] = []
    forward = i3d.ClipNetwork.forward
    monkeypatch.setattr(i3d.ClipNetwork, "forward", lambda network, batch: (passed.append(len(batch)), forward(network, batch))[1])
    names = [saved(tmp_path / f"{seed}.npy", clips(5, seed=seed)) for seed in (1, 2)]
    first = compare_clips(settings, names, device="cpu")
    assert sum(passed) == 10
    passed.clear()
    assert compare_clips(settings, names, device="cpu") == first
    assert passed == []
    saved(tmp_path / "2.npy", clips(5, seed=3))
    compare_clips(settings, names, device="cpu")
    assert sum(passed) == 5


def test_what_cannot_be_compared_is_named(settings, tmp_path):
    good = saved(tmp_path / "good.npy", clips(4, seed=1))
    wrong = {
        "short": clips(4, seed=1, frames=9),
        "longer": clips(4, seed=1, frames=16),
        "floats": clips(4, seed=1) / 255,
        "single": clips(1, seed=1),
        "pictures": clips(1, seed=1)[0],
    }
    for name, array in wrong.items():
        saved(tmp_path / f"{name}.npy", array)
    said = {
        "short.npy": r"short\.npy, clip 0 has 9 frames; I3D needs at least 10",
        "longer.npy": r"longer\.npy, clip 0 has 16 frames, .*good\.npy.* 12",
        "floats.npy": r"holds float64 .* not uint8",
        "single.npy": "holds 1 clip; at least 2",
        "pictures.npy": r"not uint8 of shape \(N, T, H, W, 3\)",
        "nowhere": "no folder of clips",
        "empty": "holds no clip",
        "uneven": r"uneven/0 cannot be compared: its frames differ in size: 8 x 8 and 9 x 9 px",
        "void": r"void/0 cannot be compared: the folder holds no frame",
        "torn": r"0\.npy cannot be compared",
    }
    (tmp_path / "empty").mkdir()
    for folder in ("uneven", "void"):
        (tmp_path / folder / "0").mkdir(parents=True)
    for side in (8, 9):
        Image.new("RGB", (side, side)).save(tmp_path / "uneven" / "0" / f"{side}.png")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "0.npy").write_bytes(Path(good).read_bytes()[:50])
    for name, words in said.items():
        with pytest.raises(SettingsError, match=words) as caught:
            compare_clips(settings, [good, str(tmp_path / name)], device="cpu")
        assert "\n" not in str(caught.value)
    compare_clips(settings, [str(tmp_path / "longer.npy"), str(tmp_path / "longer.npy")], device="cpu")
    with pytest.raises(SettingsError, match="has 16 frames"):  # from the cache too
        compare_clips(settings, [good, str(tmp_path / "longer.npy")], device="cpu")


def test_weights_that_are_missing_or_others_are_named(settings, weights, tmp_path):
    """One line that says what to download and where to put it; no other network stands in."""
    good = saved(tmp_path / "good.npy", clips(4, seed=1))
    (tmp_path / "text.pt").write_text("no network")
    for chosen, words in (
        (ClipSettings(), r"I3D, which needs weights; download i3d_torchscript\.pt of StyleGAN-V from https://\S+ and set evaluation\.clips\.weights"),
        (ClipSettings(weights=tmp_path / "absent.pt"), r"no file .*absent\.pt; download"),
        (ClipSettings(weights=tmp_path / "text.pt"), "not a TorchScript file"),
        (ClipSettings(weights=save_network(tmp_path / "few.pt", logits=101)), r"gave shape \(4, 101\) for 4 clips"),
        (ClipSettings(weights=weights, sha256="0" * 64), "these are other weights"),
    ):
        with pytest.raises(SettingsError, match=words) as caught:
            compare_clips(settings.model_copy(update={"clips": chosen}), [good, good], device="cpu")
        assert "\n" not in str(caught.value)
    torch.jit.script(nn.Linear(3, 3)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(SettingsError, match="does not take clips as I3D does"):
        compare_clips(settings.model_copy(update={"clips": ClipSettings(weights=tmp_path / "linear.pt")}), [good, good], device="cpu")


def test_the_command_prints_a_table_or_json(weights, tmp_path, capsys):
    names = [saved(tmp_path / f"{seed}.npy", clips(5, seed=seed)) for seed in (1, 2)]
    given = ["evaluate", "--clips", *names, "--set", f"evaluation.clips.weights={weights}"]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("FVD", "KVD", "5 clips of 12 frames", names[1], "5 clips are few"))
    assert main([*given, "--json"]) == 0
    assert f"{json.loads(capsys.readouterr().out)['rows'][0]['fvd']:.4g}" in shown
    for wrong, said in ((["--clips", *names], "download i3d_torchscript.pt"), (["--clips", names[0]], "alone"), (["--clips"], "goes with SETs")):
        assert main(["evaluate", *wrong]) == 2
        assert said in capsys.readouterr().err
    assert main([*given, "--statistics", "a.npz"]) == 2


def test_reports_do_not_know_of_clips(settings):
    """Where I3D lies shapes no number of a report, so it moves no report's address."""
    assert settings.digest() == EvaluationSettings(half_samples=10).digest()
