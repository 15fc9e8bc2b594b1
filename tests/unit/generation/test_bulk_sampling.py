"""What a sample depends on, and what it does not."""

import numpy as np
import pytest
import torch
from models import NATIVE, saved_base

from selfcascade.bases import resolve_base
from selfcascade.cascade.memory import next_tier
from selfcascade.config import CascadeSettings
from selfcascade.generation import methods, models, sampling
from selfcascade.generation.latents import latents_key
from selfcascade.generation.models import OutOfMemory, is_memory, load_pipeline, outline, resolve_device
from selfcascade.generation.prompts import Prompt, read_prompt_file
from selfcascade.generation.sampling import batches_of, samples
from selfcascade.generation.seeds import sample_generator, sample_specs
from selfcascade.settings import SettingsError

ALL = ("base", "lanczos", "direct", "tuning-free", "tuned")


@pytest.fixture
def specs(prompt_file):
    return sample_specs(read_prompt_file(prompt_file), run_seed=0, per_prompt=1)


def pipeline_of(settings, upsampler):
    return load_pipeline(settings.base, str(upsampler) if settings.method == "tuned" else None, device="cpu")


def pictures(settings, upsampler, specs, store=None):
    pipeline = pipeline_of(settings, upsampler)
    return {sample.key: sample.image for sample in samples(pipeline, specs, settings, store=store, base="tiny@0")}


def close(one, other):
    """Equal to one level of 255 here and there: a sum in another order may round the other way."""
    difference = np.abs(one.astype(int) - other.astype(int))
    return difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("method", ["base", "direct", "tuned"])
def test_a_batch_of_one_is_a_batch_of_four(generation, tiny_upsampler, specs, method):
    """Float tolerance: at most one level of 255, in under one percent of the values."""
    generation = generation.model_copy(update={"method": method, "cascade": generation.cascade.model_copy(update={"eta": 1.0})})
    fours = pictures(generation.model_copy(update={"batch": 4}), tiny_upsampler, specs[:4])
    ones = pictures(generation.model_copy(update={"batch": 1}), tiny_upsampler, specs[:4])
    assert all(close(ones[key], fours[key]) for key in fours)
    assert len({picture.tobytes() for picture in fours.values()}) == 4


@pytest.mark.parametrize("method", ["direct", "tuned"])
def test_neither_order_nor_neighbours_change_a_sample(generation, tiny_upsampler, specs, method):
    """Backwards, in other batches beside other samples: to the tolerance of another batch size at most."""
    generation = generation.model_copy(update={"method": method})
    forward = pictures(generation, tiny_upsampler, specs)
    backward = pictures(generation, tiny_upsampler, specs[::-1])
    assert list(backward) == list(forward)[::-1]
    assert all(close(forward[key], backward[key]) for key in forward)


@pytest.mark.parametrize("method", ["base", "direct", "tuned"])
def test_cached_base_latents_are_uncached_ones_bit_for_bit(store, generation, tiny_upsampler, specs, method):
    """Without a store, with an empty cache, and with a full one: equal pictures; a full cache spares the base's pass."""
    generation = generation.model_copy(update={"method": method, "cascade": generation.cascade.model_copy(update={"eta": 0.7})})
    runs = [pictures(generation, tiny_upsampler, specs[:3], kept) for kept in (None, store, store)]
    for other in runs[1:]:
        assert all(np.array_equal(runs[0][key], other[key]) for key in runs[0])
    assert len(list(store.list("cache/"))) == (method != "direct")


def test_the_methods_share_one_pass_of_the_base(store, generation, tiny_upsampler, specs, monkeypatch):
    calls = []
    original = sampling.base_latents
    monkeypatch.setattr(sampling, "base_latents", lambda *arguments: calls.append(1) or original(*arguments))
    for method in ALL:
        pictures(generation.model_copy(update={"method": method}), tiny_upsampler, specs[:4], store)
    assert len(calls) == 2  # two batches, sampled for one method of the five
    assert len(list(store.list("cache/"))) == 1


def test_a_damaged_cache_is_made_anew(store, generation, tiny_upsampler, specs):
    good = pictures(generation, tiny_upsampler, specs[:2], store)
    (info,) = store.list("cache/")
    data = store.read(info.key)
    for damaged in (data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], data[:50], b""):
        store.put_cache(info.key, damaged)
        again = pictures(generation, tiny_upsampler, specs[:2], store)
        assert all(np.array_equal(good[key], again[key]) for key in good)
        assert store.read(info.key) == data


def test_the_cascade_is_what_one_call_of_the_pipeline_gives(generation, tiny_upsampler, specs):
    """Stage 0 apart and the rest from its latent, against all stages in one call by hand: the same pictures, tuned and tuning-free."""
    for method in ("tuning-free", "tuned"):
        settings = generation.model_copy(update={"method": method})
        pipeline = pipeline_of(settings, tiny_upsampler)
        cascade = settings.cascade
        found = [sample.image for sample in samples(pipeline, specs[:2], settings)]
        by_hand = pipeline(
            [spec.prompt for spec in specs[:2]],
            height=cascade.height,
            width=cascade.width,
            num_inference_steps=cascade.steps,
            guidance_scale=cascade.guidance_scale,
            generator=[sample_generator(spec.seed) for spec in specs[:2]],
        ).images
        assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(found, by_hand, strict=True))


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_bases_of_other_families_are_sampled_by_ddim(generation, specs, tmp_path, kind):
    """Four levels, and two text encoders with size ids and a base that ships Euler: the paper's sampler, an eta that counts, sizes of the target."""
    folder = str(saved_base(tmp_path / kind, kind))
    pipeline = load_pipeline(folder, device="cpu")
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert pipeline.scheduler.config.clip_sample is False
    found = []
    for eta in (0.0, 1.0):
        settings = generation.model_copy(update={"base": folder, "cascade": generation.cascade.model_copy(update={"eta": eta, "steps": 3})})
        found.append(next(samples(pipeline, specs[:1], settings)).image)
    assert found[0].shape == (2 * NATIVE, 2 * NATIVE, 3)
    assert not np.array_equal(*found)


def test_every_method_has_its_size_and_its_own_pictures(generation, tiny_upsampler, specs):
    made = {method: pictures(generation.model_copy(update={"method": method}), tiny_upsampler, specs[:1]) for method in ALL}
    found = {method: next(iter(found.values())) for method, found in made.items()}
    assert {method: picture.shape for method, picture in found.items()} == {
        method: (NATIVE, NATIVE, 3) if method == "base" else (2 * NATIVE, 2 * NATIVE, 3) for method in ALL
    }
    assert all(picture.dtype == np.uint8 for picture in found.values())
    assert len({picture.tobytes() for picture in found.values()}) == 5


def test_lanczos_is_pillows_enlargement_of_the_bases_own_picture(generation, tiny_upsampler, specs):
    from PIL import Image

    (small,) = pictures(generation.model_copy(update={"method": "base"}), tiny_upsampler, specs[:1]).values()
    (large,) = pictures(generation.model_copy(update={"method": "lanczos"}), tiny_upsampler, specs[:1]).values()
    assert np.array_equal(large, np.asarray(Image.fromarray(small).resize((2 * NATIVE, 2 * NATIVE), Image.Resampling.LANCZOS)))


def test_rectangles_of_three_stages(generation, tiny_upsampler, specs):
    cascade = CascadeSettings(height=4 * NATIVE, width=2 * NATIVE, steps=2, guidance_scale=1.0)
    for method in ("base", "lanczos", "tuned"):
        settings = generation.model_copy(update={"method": method, "cascade": cascade})
        (picture,) = pictures(settings, tiny_upsampler, specs[:1]).values()
        assert picture.shape[:2] == ((96, 32) if method == "base" else (256, 128))


def test_nothing_runs_before_the_first_sample_is_asked_for(generation, tiny_upsampler, specs, monkeypatch):
    calls = []
    original = methods.decode
    monkeypatch.setattr(methods, "decode", lambda *arguments, **options: calls.append(1) or original(*arguments, **options))
    stream = samples(pipeline_of(generation, tiny_upsampler), specs, generation)
    assert not calls
    next(stream)
    assert len(calls) == 1


def test_batches_do_not_mix_prompts_with_and_without_a_negative_one():
    prompts = [Prompt("a", "cat"), Prompt("b", "cat"), Prompt("c", "cat", negative_prompt="blurry"), Prompt("d", "cat"), Prompt("e", "cat"), Prompt("f", "cat")]
    specs = sample_specs(prompts, run_seed=0, per_prompt=1)
    assert [[spec.prompt_id for spec in batch] for batch in batches_of(specs, 2)] == [["a", "b"], ["c"], ["d", "e"], ["f"]]


def key_of(specs, settings, *, base="tiny@0", dtype=torch.float32, compiled=False):
    return latents_key(specs, settings, base=base, dtype=dtype, compiled=compiled, device=torch.device("cpu"))


def test_whatever_shapes_the_base_latents_is_in_their_key(generation, specs, monkeypatch):
    changes = ({"steps": 5}, {"guidance_scale": 2.0}, {"eta": 0.5}, {"height": 192}, {"width": 192})
    keys = {key_of(specs, generation.model_copy(update={"cascade": generation.cascade.model_copy(update=change)})) for change in changes}
    keys |= {key_of(specs, generation), key_of(specs, generation, base="tiny@1"), key_of(specs, generation, dtype=torch.bfloat16)}
    keys |= {key_of(specs[:-1], generation), key_of(specs[::-1], generation), key_of(specs, generation.model_copy(update={"batch": 3}))}
    keys.add(key_of(specs, generation, compiled=True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.add(key_of(specs, generation))
    monkeypatch.setattr(torch, "__version__", "0")
    keys.add(key_of(specs, generation))
    assert len(keys) == len(changes) + 9


def test_what_only_later_stages_see_is_not_in_the_key_of_the_base_latents(generation, specs):
    cascade = generation.cascade.model_copy(update={"start": 0.5, "t_min": 100, "strength": 0.5})
    assert key_of(specs, generation.model_copy(update={"method": "base", "chunk": 9, "cascade": cascade})) == key_of(specs, generation)


def test_bfloat16_is_close_to_float32(generation, tiny_upsampler, specs):
    """The autoencoder stays in fp32; the UNet's rounding moves a picture by under three levels on average."""
    exact = pictures(generation, tiny_upsampler, specs[:2])
    pipeline = load_pipeline(generation.base, dtype="bfloat16", device="cpu")
    assert (pipeline.vae.dtype, pipeline.unet.dtype) == (torch.float32, torch.bfloat16)
    for sample in samples(pipeline, specs[:2], generation):
        assert np.abs(exact[sample.key].astype(int) - sample.image).mean() < 3


def test_out_of_memory_is_one_line_that_names_what_to_lower(generation, tiny_upsampler, specs, monkeypatch):
    def explode(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(methods, "decode", explode)
    with pytest.raises(OutOfMemory, match=r"out of memory while sampling 2 pictures of 128x128 .* lower generation\.batch \(now 2\)") as caught:
        next(samples(pipeline_of(generation, tiny_upsampler), specs, generation))
    assert isinstance(caught.value, SettingsError)


def test_out_of_memory_goes_one_tier_down_once_and_says_so(generation, tiny_upsampler, specs, monkeypatch, caplog):
    """The first pass of both branches fails: the batch and what follows run branch after branch, the picture is the same to float tolerance, and it is told."""
    expected = pictures(generation.model_copy(update={"method": "tuned"}), tiny_upsampler, specs[:4])
    pipeline = pipeline_of(generation.model_copy(update={"method": "tuned"}), tiny_upsampler)
    tuned = generation.model_copy(update={"method": "tuned", "batch": 2})
    forward, failed, batches = pipeline.unet.forward, [], []

    def narrow(sample, *arguments, **options):
        batches.append(len(sample))
        if len(sample) > 2:
            failed.append(len(sample))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(pipeline.unet, "forward", narrow)
    tiers = []
    with caplog.at_level("WARNING"):
        made = {sample.key: sample.image for sample in samples(pipeline, specs[:4], tuned, on_tier=tiers.append)}
    assert failed == [4]
    assert tiers == ["lean", "lean"]
    assert "out of memory while sampling 2 pictures" in caplog.text
    assert "going on with generation.memory=lean" in caplog.text
    assert all(close(made[key], expected[key]) for key in expected)


@pytest.mark.parametrize("scheduler", ["euler", "euler-ancestral", "dpm++", "unipc", "lcm"])
def test_every_solver_samples_in_bulk(generation, specs, scheduler):
    """On the base's own noise schedule: another picture than DDIM's, the same whatever the batch, and other base latents in the cache."""
    free = generation.model_copy(update={"method": "tuning-free"})
    solved = free.model_copy(update={"cascade": free.cascade.model_copy(update={"scheduler": scheduler})})
    pipeline = load_pipeline(free.base, scheduler=scheduler, device="cpu")
    assert dict(pipeline.scheduler.config)["beta_schedule"] == "scaled_linear"
    fours, ones = ({s.key: s.image for s in samples(pipeline, specs[:4], solved.model_copy(update={"batch": batch}))} for batch in (4, 1))
    assert all(close(ones[key], fours[key]) for key in fours)
    assert all(not close(picture, fours[key]) for key, picture in pictures(free, None, specs[:4]).items())
    keys = {key_of(specs, settings) for settings in (free, solved)}
    assert len(keys) == 2


def test_tiers_give_the_same_picture(generation, tiny_upsampler, specs):
    tuned = generation.model_copy(update={"method": "tuned"})
    fast, lean = (pictures(tuned.model_copy(update={"memory": memory}), tiny_upsampler, specs[:2]) for memory in ("fast", "lean"))
    assert all(close(fast[key], lean[key]) for key in fast)


def test_tiers_in_order():
    assert [next_tier(memory, accelerated=True) for memory in ("fast", "lean", "offload")] == ["lean", "offload", None]
    assert [next_tier(memory, accelerated=False) for memory in ("fast", "lean", "offload")] == ["lean", None, None]


def test_networks_that_do_not_fit_are_one_line(generation, monkeypatch, tmp_path):
    def explode(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(models.SelfCascadePipeline, "from_pretrained", explode)
    with pytest.raises(OutOfMemory, match="out of memory while loading base 'tiny' on cpu; set generation"):
        load_pipeline(generation.base, device="cpu", dtype="float16")


def test_a_real_allocation_that_fails_is_taken_for_what_it_is():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_memory(caught.value)
    assert not is_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_method_and_pipeline_must_agree(generation, tiny_upsampler, specs):
    with pytest.raises(SettingsError, match="method 'tuned' needs an upsampler"):
        samples(load_pipeline(generation.base, device="cpu"), specs, generation.model_copy(update={"method": "tuned"}))
    with pytest.raises(SettingsError, match="method 'tuning-free' is given a pipeline with an upsampler"):
        samples(load_pipeline(generation.base, str(tiny_upsampler), device="cpu"), specs, generation)


def test_networks_are_loaded_once_and_shared(generation, tiny_upsampler):
    plain = load_pipeline(generation.base, device="cpu")
    tuned = load_pipeline(generation.base, str(tiny_upsampler), device="cpu")
    assert load_pipeline(generation.base, device="cpu") is plain
    assert tuned.unet is plain.unet
    assert tuned.vae is plain.vae
    assert plain.upsampler is None
    assert load_pipeline(generation.base, str(tiny_upsampler), device="cpu").upsampler is tuned.upsampler
    assert not any(parameter.requires_grad for network in (tuned.unet, tuned.vae, tuned.upsampler, tuned.text_encoder) for parameter in network.parameters())


def test_the_outline_of_a_base_is_what_its_networks_say(generation):
    pipeline = load_pipeline(generation.base, device="cpu")
    assert outline(resolve_base(generation.base)) == (pipeline.spec, pipeline.config.base)


def test_a_saved_cascade_is_a_base_that_upsamplers_know_by_its_origin(generation, tiny_upsampler, tmp_path):
    """Its own upsampler does not guide unless it is asked for: method tuning-free stays tuning-free."""
    tuned = load_pipeline(generation.base, str(tiny_upsampler), device="cpu")
    tuned.save_pretrained(tmp_path / "saved")
    again = load_pipeline(str(tmp_path / "saved"), device="cpu")
    assert again.upsampler is None
    assert outline(resolve_base(str(tmp_path / "saved")))[1] == again.config.base == str(resolve_base(generation.base))
    assert load_pipeline(str(tmp_path / "saved"), str(tiny_upsampler), device="cpu").upsampler is not None


def test_a_device_that_is_not_there_is_one_line():
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda:77", "warp"):
        with pytest.raises(SettingsError, match=f"execution.device '{name}' cannot be used here") as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value)
