from __future__ import annotations

import pytest
import torch

from selfcascade.adaptation.checkpoint import CheckpointFolder, clear_checkpoints, newest_step
from selfcascade.settings import SettingsError
from selfcascade.storage import Store

VERSION, LATENTS = "a" * 64, "b" * 64


def folder(store: Store, latents: str = LATENTS) -> CheckpointFolder:
    return CheckpointFolder(store, version=VERSION, latents=latents)


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weights/w": torch.full((3, 2), float(step)), "random/draws": torch.Generator().manual_seed(step).get_state()}


def test_the_newest_comes_back_and_two_are_kept(store: Store) -> None:
    """Of five checkpoints the last two stay; steps order as numbers, also beyond six digits."""
    for step in (2, 10, 100, 999_999, 1_000_000):
        folder(store).save(step, tensors(step), {"step": step, "position": 4 * step})
    assert folder(store).steps() == [999_999, 1_000_000]
    assert newest_step(store, VERSION) == 1_000_000
    newest = folder(store).newest()
    assert newest is not None
    assert (newest.step, newest.record) == (1_000_000, {"step": 1_000_000, "position": 4_000_000})
    assert torch.equal(newest.tensors["weights/w"], tensors(1_000_000)["weights/w"])
    assert torch.equal(newest.tensors["random/draws"], tensors(1_000_000)["random/draws"])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped byte or a cut-off end costs the steps since the last sound checkpoint, and the log names the object."""
    for step in (1, 2):
        folder(store).save(step, tensors(step), {"step": step})
    key = f"{folder(store).prefix}step-000002.safetensors"
    whole = store.read(key)
    for damaged in (whole[:-30] + bytes([whole[-30] ^ 4]) + whole[-29:], whole[:-8], b""):
        store.put_cache(key, damaged)
        caplog.clear()
        newest = folder(store).newest()
        assert newest is not None
        assert newest.step == 1
        assert key in caplog.text
    store.put_cache(f"{folder(store).prefix}step-000001.safetensors", b"nothing")
    assert folder(store).newest() is None


def test_other_latents_have_checkpoints_of_their_own(store: Store) -> None:
    """Two machines that train one version on latents of their own do not meet; a checkpoint moved between them is refused."""
    folder(store).save(3, tensors(3), {"step": 3})
    other = folder(store, "c" * 64)
    assert other.newest() is None
    store.put_cache(f"{other.prefix}step-000003.safetensors", store.read(f"{folder(store).prefix}step-000003.safetensors"))
    with pytest.raises(SettingsError, match=r"was trained on latents bbbbbbbbbbbb…, but the cache holds cccccccccccc…; delete it to start over"):
        other.newest()


def test_clearing_takes_all_of_a_version_and_no_other(store: Store) -> None:
    folder(store).save(3, tensors(3), {"step": 3})
    folder(store, "c" * 64).save(4, tensors(4), {"step": 4})
    CheckpointFolder(store, version="d" * 64, latents=LATENTS).save(5, tensors(5), {"step": 5})
    clear_checkpoints(store, VERSION)
    assert (newest_step(store, VERSION), newest_step(store, "d" * 64)) == (0, 5)
