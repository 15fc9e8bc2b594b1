from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import models
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import tiny_settings, tiny_trainer

from selfcascade.adaptation.adapt import adapt
from selfcascade.adaptation.buckets import bucket_of, bucket_sizes
from selfcascade.adaptation.cache import EMPTY, Encoder, LatentCache, Recipe, _cover
from selfcascade.adaptation.dataset import TrainingOrder
from selfcascade.adaptation.requirements import buckets_of
from selfcascade.adaptation.tensorfile import TensorFile, written_tensor_file
from selfcascade.adaptation.validation import Validation, averaged_weights
from selfcascade.bases import load_pipeline, resolve_base
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import AdaptationSettings, CurationSettings
from selfcascade.curation.encoding import encode
from selfcascade.curation.record import Entry, Picture
from selfcascade.curation.shards import write_tar
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, Store

SIZES = ((256, 64), (128, 128), (64, 256))


@given(step=st.sampled_from([16, 64, 128]), steps=st.integers(1, 32), ratio=st.floats(1, 16))
def test_buckets_are_about_one_area(step: int, steps: int, ratio: float) -> None:
    """Multiples of the step, never more pixels than the square, within one step of it, inside the ratio, lying and standing alike, the square among them."""
    size = step * steps
    found = bucket_sizes(size, step=step, ratio=ratio)
    assert (size, size) in found
    assert len(set(found)) == len(found)
    for height, width in found:
        assert height % step == width % step == 0
        assert size * size - step * min(height, width) < height * width <= size * size
        assert max(height, width) <= ratio * min(height, width)
        assert (width, height) in found
    assert list(found) == sorted(found, key=lambda pair: pair[1] / pair[0])


def test_buckets_of_published_bases() -> None:
    """At 1024 from SD 2.1, whose step with halving is 128, up to a ratio of 2: counted by hand."""
    assert bucket_sizes(1024, step=128, ratio=2) == ((1280, 768), (1152, 896), (1024, 1024), (896, 1152), (768, 1280))


@given(height=st.integers(32, 1200), width=st.integers(32, 1200))
def test_a_picture_goes_to_the_nearest_bucket_that_it_covers(height: int, width: int) -> None:
    """Nearest in the logarithm of the aspect ratio, by a search over all; and what is cut out of it is that size, never enlarged."""
    covered = [(h, w) for h, w in SIZES if h <= height and w <= width]
    found = bucket_of((height, width), SIZES)
    if not covered:
        assert found is None
        return
    distances = [abs(log(w / h * height / width)) for h, w in covered]
    assert found == covered[int(np.argmin(distances))] or min(distances) == pytest.approx(abs(log(found[1] / found[0] * height / width)))


@pytest.mark.parametrize(("height", "width", "target"), [(512, 130, (256, 64)), (64, 700, (64, 256)), (90, 256, (64, 256)), (300, 300, (128, 128))])
def test_the_crop_is_the_centre_of_what_covers(height: int, width: int, target: tuple[int, int]) -> None:
    """Of a picture whose red is its row and whose green is its column, rising by one over all of each: the cut has the middle, at the told place."""
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([rows * 255 / height, columns * 255 / width, 0 * rows], axis=-1).astype(np.uint8)
    assert bucket_of((height, width), SIZES) == target
    cut, (top, left) = _cover(picture, target)
    assert cut.shape == (*target, 3)
    scale = max(target[0] / height, target[1] / width)
    assert (top, left) == (round((height * scale - target[0]) / 2 - 0.25), round((width * scale - target[1]) / 2 - 0.25))
    middle = cut[target[0] // 2, target[1] // 2, :2]
    assert np.abs(middle.astype(int) - 127).max() <= 4


KEYS = st.lists(st.integers(1, 12), min_size=1, max_size=4).map(lambda sizes: [[f"b{bucket}k{key}" for key in range(n)] for bucket, n in enumerate(sizes)])


@given(buckets=KEYS, seed=st.integers(0, 2**31), batch=st.integers(1, 6), epochs=st.integers(1, 4))
def test_every_pass_of_a_bucket_visits_every_picture_once(buckets: list[list[str]], seed: int, batch: int, epochs: int) -> None:
    """Batches are full and of one bucket. Each bucket's keys, in the order in which they come, are permutations of it one after another; and after so many
    epochs every bucket has had all of its passes but for less than a batch, which is carried over."""
    total = sum(map(len, buckets))
    if total < batch:
        return
    order = TrainingOrder(buckets, seed=seed, batch=batch)
    batches = sum(epochs * len(keys) // batch for keys in buckets)
    seen: dict[int, list[str]] = {index: [] for index in range(len(buckets))}
    for number in range(batches):
        keys = order.batch(number * batch, batch)
        assert len({key[:2] for key in keys}) == 1
        seen[int(keys[0][1])] += keys
    for index, keys in enumerate(buckets):
        assert 0 <= epochs * len(keys) - len(seen[index]) < batch
        for start in range(0, len(seen[index]), len(keys)):
            counted = Counter(seen[index][start : start + len(keys)])
            assert max(counted.values()) == 1
            assert len(counted) == len(keys) or start + len(keys) > len(seen[index])


@given(buckets=KEYS, seed=st.integers(0, 2**31), batch=st.integers(1, 6), position=st.integers(0, 80), count=st.integers(1, 24), cut=st.integers(0, 24))
def test_a_position_in_buckets_is_the_whole_state(buckets: list[list[str]], seed: int, batch: int, position: int, count: int, cut: int) -> None:
    """Read at once, in two parts, from a fresh object, and whatever order the keys of a bucket came in: the same sequence."""
    if sum(map(len, buckets)) < batch:
        return
    order, cut = TrainingOrder(buckets, seed=seed, batch=batch), min(cut, count)
    whole = order.batch(position, count)
    assert order.batch(position, cut) + order.batch(position + cut, count - cut) == whole
    assert TrainingOrder([keys[::-1] for keys in buckets], seed=seed, batch=batch).batch(position, count) == whole


def test_buckets_are_mixed() -> None:
    """An epoch does not take one bucket after the other, and the next one mixes them in another way."""
    order = TrainingOrder([[f"a{n}" for n in range(32)], [f"b{n}" for n in range(32)]], seed=0, batch=4)
    first, second = (["".join(sorted({key[0] for key in order.batch(64 * epoch + 4 * n, 4)})) for n in range(16)] for epoch in (0, 1))
    assert Counter(first) == {"a": 8, "b": 8}
    assert first not in (["a"] * 8 + ["b"] * 8, ["b"] * 8 + ["a"] * 8, second)


def of_shapes(counts: dict[tuple[int, int], int]) -> LatentCache:
    """Random latents, so many of each height and width."""
    generator = torch.Generator().manual_seed(0)
    tensors, samples = {f"{EMPTY}/text": torch.zeros(12, models.TEXT)}, {}
    for index, shape in enumerate(shape for shape, count in counts.items() for _ in range(count)):
        key = f"s{index:02d}"
        target = torch.randn(4, *shape, generator=generator)
        tensors |= {
            f"{key}/target": target,
            f"{key}/pivot": torch.nn.functional.avg_pool2d(target, 2),
            f"{key}/text": torch.randn(12, models.TEXT, generator=generator),
        }
        samples[key] = {"caption": f"caption {index}", "split": "tune" if index % 3 == 2 else "train"}
    with written_tensor_file(tensors, {"recipe": "r", "shard": "s", "samples": samples}) as path:
        return LatentCache([TensorFile(path, name="synthetic")], digest="0" * 64)


@pytest.mark.parametrize("trainable", ["upsampler", "latent-upscaler"])
def test_training_in_buckets_goes_on_where_it_was(trainable: str) -> None:
    """Steps of several sizes, in parts, come from one generator: interrupted equals uninterrupted, bit for bit, and the validation takes every picture once."""
    latents = of_shapes({(32, 8): 5, (16, 16): 6, (8, 32): 4})
    settings = tiny_settings("b", trainable=trainable, batch=2, accumulation=2, steps=6)

    def after(trainer: object) -> dict[str, bytes]:
        return {name: tensor.numpy().tobytes() for name, tensor in trainer.state()[0].items() if name != "random/torch"}  # type: ignore[attr-defined]

    whole, seen = tiny_trainer(latents, settings), set()
    for step in range(6):
        if step == 3:
            tensors, record = whole.state()
            saved = {name: tensor.clone() for name, tensor in tensors.items()}, record
        seen.add(latents.shape(whole.order.batch(whole.position, 1)[0]))
        whole.advance()
    assert len(seen) > 1
    resumed = tiny_trainer(latents, settings)
    resumed.restore(*saved)
    for _ in range(3):
        resumed.advance()
    assert after(resumed) == after(whole)

    validation = Validation(whole)
    validation.look()
    with averaged_weights(whole), torch.no_grad():
        alone = [float(validation._errors([key], number)) for number in range(len(validation.bins) or 1) for key in validation.keys]
    assert len(validation.keys) == 5
    assert validation.rows[0].loss == pytest.approx(sum(alone) / len(alone), rel=1e-5)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.saved_base(tmp_path_factory.mktemp("sdxl") / "sdxl", "sdxl")


def test_size_ids_are_those_of_the_crop(sdxl: Path) -> None:
    """Height and width of the picture, top and left of its crop, height and width of its bucket, in this order; without buckets there are none."""
    pipeline = SelfCascadePipeline.from_pipe(load_pipeline(resolve_base(str(sdxl))))
    recipe = replace(Recipe.here(base="b", size=128, device="cpu"), buckets=SIZES)
    made = Encoder(pipeline, recipe).latents(np.zeros((520, 140, 3), np.uint8))
    assert made["ids"].tolist() == [520, 140, 0, 2, 256, 64]  # shrunk to 256 x 69
    assert made["target"].shape[-2:] == (32, 8)
    assert "ids" not in Encoder(pipeline, replace(recipe, buckets=())).latents(np.zeros((520, 140, 3), np.uint8))


def dataset_of(store: Store, sizes: Sequence[tuple[int, int]], name: str) -> None:
    """A published dataset of captioned noise of these heights and widths, every fifth in the tune split."""
    random = np.random.default_rng(0)

    def sample(index: int, size: tuple[int, int]) -> tuple[Entry, Picture, str]:
        image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        entry = Entry(f"p{index:02d}", f"p{index:02d}.png", 1, "sha256:0", f"picture {index}")
        return entry, Picture(*encode(image, "png"), size[1], size[0], "0" * 64, {}), "tune" if index % 5 == 4 else "train"

    artifact = Artifact.plan(store, "datasets", name, CurationSettings(name=name, size=128), {"source": "0" * 64})
    with TemporaryDirectory() as folder:
        path = Path(folder, "00000.tar")
        write_tar(path, (sample(index, size) for index, size in enumerate(sizes)))
        artifact.put("00000.tar", path)
    tune = len(range(4, len(sizes), 5))
    artifact.publish(counts={"train": len(sizes) - tune, "tune": tune})


def test_pictures_of_several_ratios_train_with_their_own_size_ids(world: Store, sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on SDXL's kind of base publishes; in every training step and validation the UNet is told height, width, crop and target of the very pictures,
    whose latents have that target's shape; previews, at the square, are told theirs."""
    sizes = [(128, 128), (300, 64), (64, 300), (140, 128), (260, 70), (64, 256), (129, 131), (500, 100), (256, 64), (70, 290)]
    dataset_of(world, sizes, "ratios")
    told: list[tuple[tuple[int, ...], list[float]]] = []
    inner = UNet2DConditionModel.forward

    def forward(self: UNet2DConditionModel, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        told.extend((tuple(sample.shape[-2:]), ids) for ids in kwargs["added_cond_kwargs"]["time_ids"].tolist())
        return inner(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    settings = tiny_settings(sdxl, name="ratios", dataset="datasets/ratios", buckets=4, batch=2, steps=6, trainable="full")
    artifact = Artifact(world, adapt(settings, world))
    expected = {}
    for size in sizes:
        target = bucket_of(size, SIZES)
        assert target is not None
        _, corner = _cover(np.zeros((*size, 3), np.uint8), target)
        expected[(*size, *corner, *target)] = (target[0] // 8, target[1] // 8)
    assert len({shape for shape, _ in told}) == 3
    assert all(expected[tuple(int(value) for value in ids)] == shape for shape, ids in told)
    assert artifact.manifest().counts["train_samples"] == 8
    assert artifact.manifest().settings["buckets"] == 4


def test_a_picture_that_covers_no_bucket_is_named(world: Store, tiny_base: Path) -> None:
    dataset_of(world, [(128, 128)] * 9 + [(63, 500)], "small")
    with pytest.raises(SettingsError, match=r"datasets/small@\w+, picture p09: 500x63 pixels cover no bucket of adaptation\.size=128; lower it"):
        adapt(tiny_settings(tiny_base, name="small", dataset="datasets/small", buckets=4), world)


def test_buckets_follow_the_base(tiny_base: Path) -> None:
    """The step is the base's with halving; a ratio that lets in the square alone is refused with the smallest that does not."""
    base = resolve_base(str(tiny_base))
    assert buckets_of(tiny_settings(tiny_base), base) == ()
    found = buckets_of(tiny_settings(tiny_base, buckets=4), base)
    assert found == SIZES
    with pytest.raises(SettingsError, match=r"adaptation\.buckets=2 leaves the square alone at adaptation\.size=128 of base tiny; raise it to 4 or above"):
        buckets_of(tiny_settings(tiny_base, buckets=2), base)


def test_without_buckets_everything_keeps_its_address(tiny_base: Path) -> None:
    """The setting enters neither the settings of a run nor the recipe of latents unless it is set."""
    settings: AdaptationSettings = tiny_settings(tiny_base)
    assert "buckets" not in settings.what()
    assert settings.model_copy(update={"buckets": 2.0}).digest() != settings.digest()
    recipe = Recipe.here(base="b", size=128, device="cpu")
    assert replace(recipe, buckets=SIZES).digest != recipe.digest
