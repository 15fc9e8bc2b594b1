"""What a call leaves behind: nothing. Also when it ends early, and while another shares its networks; and pipelines that are copied, saved and sent."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import models
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from test_cascade_pipeline import PROMPTS, generators, quiet, sample
from test_coexistence import base_bits, bits, cascade, stock_base
from test_injection import case, hooks
from test_injection import stock as stock_pass

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import attention_scaling, scalecrafter
from selfcascade.cascade.conditioning import encode
from selfcascade.cascade.injection import attached
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.cascade.upsampler_set import UpsamplerSet
from selfcascade.config import BaselineSettings
from selfcascade.storage import Artifact, Store


class Remembered:
    """A pipeline as it was, down to the attribute: weights, hooks, processors, settings of every module, scheduler, and the bits that it makes."""

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self.bits = base_bits(pipeline)  # after which transformers and the pipeline's own scheduler have left their own traces
        self.weights = {name: copy.deepcopy(network.state_dict()) for name, network in self.networks().items()}
        self.before = self.now()

    def networks(self) -> dict[str, torch.nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}

    def now(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"config": dict(self.pipeline.config), "scheduler": {name: id(value) for name, value in vars(self.pipeline.scheduler).items()}}
        for name, network in self.networks().items():
            modules = dict(network.named_modules())
            plain = {
                (path, key): value
                for path, module in modules.items()
                for key, value in vars(module).items()
                if isinstance(value, bool | int | float | str | None)
            }
            parts[name] = {
                "hooks": hooks(network),
                "modules": {path: (id(module), type(module), sorted(vars(module))) for path, module in modules.items()},
                "plain": plain,
                "tensors": {path: (id(value), value.dtype, value.device, value.requires_grad) for path, value in network.named_parameters()},
            }
        parts["processors"] = {name: id(processor) for name, processor in self.pipeline.unet.attn_processors.items()}
        return parts

    def check(self) -> None:
        assert self.now() == self.before
        for name, network in self.networks().items():
            assert all(torch.equal(value, self.weights[name][key]) for key, value in network.state_dict().items())
        assert torch.equal(base_bits(self.pipeline), self.bits)
        self.before = self.now()  # the stock pipeline's call sets its scheduler anew


class Stop(Exception):
    """An error of the user's own."""


def raising(error: type[BaseException], at: int):
    """A callback that fails at a step, counted over the stages."""

    def callback(pipe, step, t, tensors):
        if step == at:
            raise error
        return {}

    return callback


@pytest.mark.parametrize(("kind", "inject"), [("small", "main"), ("sd21", "skip"), ("sdxl", "main")])
def test_a_call_leaves_the_users_pipeline_as_it_was(kind, inject):
    stock = stock_base(kind)
    before = Remembered(stock)
    pipeline = cascade(stock, inject)
    pipeline("a cat", 128, 128, num_inference_steps=2, upscale="pixel")
    before.check()


@pytest.mark.parametrize(("kind", "error"), [("small", Stop), ("sd21", KeyboardInterrupt), ("sdxl", KeyboardInterrupt)])
def test_a_call_that_fails_leaves_the_users_pipeline_as_it_was(kind, error):
    """In a callback of the base or of the guided stage, inside the upsampler, which is in the middle of the UNet's pass, and in the decoder. The next call
    is as if there had been none."""
    stock = stock_base(kind)
    before = Remembered(stock)
    pipeline = cascade(stock)
    expected = bits(pipeline)

    def fail(*_):
        raise error

    for step in (0, 3, 4):
        with pytest.raises(error):
            bits(pipeline, callback_on_step_end=raising(error, step))
        before.check()
    for module in (pipeline.upsampler.levels[2], stock.unet.down_blocks[1], stock.unet.up_blocks[0], stock.vae.decoder):
        handle = module.register_forward_hook(fail)
        with pytest.raises(error):
            pipeline("a cat", 128, 128, num_inference_steps=1)
        handle.remove()
        before.check()
    assert torch.equal(bits(pipeline), expected)


def test_a_decoder_that_fails_goes_back_to_its_precision():
    """SDXL's autoencoder works in fp32 and is given back in its own precision and without the call's tiles."""
    stock = stock_base("sdxl")
    stock.vae.register_to_config(force_upcast=True)
    stock.vae.to(torch.bfloat16)
    before = Remembered(stock)
    handle = stock.vae.decoder.register_forward_hook(lambda _, args, out: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cascade(stock)("a cat", 128, 128, num_inference_steps=1, tile_above=1)
    handle.remove()
    before.check()
    assert stock.vae.dtype == torch.bfloat16


BASELINES = [("small", attention_scaling, Stop), ("sd21", scalecrafter, KeyboardInterrupt)]


@pytest.mark.parametrize(("kind", "baseline", "error"), BASELINES, ids=["attention_scaling", "scalecrafter"])
def test_a_baseline_leaves_the_users_pipeline_as_it_was(kind, baseline, error):
    """Whole, and stopped in the middle."""
    stock = stock_base(kind)
    before = Remembered(stock)
    pipeline = quiet(SelfCascadePipeline.from_pipe(stock))
    call = {"height": 128, "width": 128, "num_inference_steps": 3, "output_type": "latent", "settings": BaselineSettings()}
    baseline.sample(pipeline, "a cat", **call)
    before.check()
    with pytest.raises(error):
        baseline.sample(pipeline, "a cat", **call, callback_on_step_end=raising(error, 1))
    before.check()


# ---- two pipelines, one UNet ----


@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_pipelines_that_share_a_unet_do_not_see_each_other_when_interleaved(kind):
    """A cascade, another with an upsampler on the main path, and the stock pipeline, each run inside a step of the first: all make the bits that they make
    alone, whichever step it is."""
    stock = stock_base(kind)
    one, two = cascade(stock, "skip"), cascade(stock, "main")
    alone = bits(one), bits(two), base_bits(stock)
    inside = []

    def nested(pipe, step, t, tensors):
        if step in (1, 4):
            inside.append((bits(two), base_bits(stock)))
        return {}

    assert torch.equal(bits(one, callback_on_step_end=nested), alone[0])
    assert len(inside) == 2
    assert all(torch.equal(nested_two, alone[1]) and torch.equal(nested_stock, alone[2]) for nested_two, nested_stock in inside)


def test_pipelines_that_share_a_unet_do_not_see_each_other_in_threads():
    """Two cascades, the stock pipeline, and attention scaling, started together; a fifth is interrupted in the middle. The bits of each alone, no hook left.

    The stock pipeline is given its text encoded, since it shares a tokenizer with threads that it knows nothing of."""
    stock = stock_base("small")
    before = Remembered(stock)
    one, two, three = cascade(stock, "skip"), cascade(stock, "main"), quiet(SelfCascadePipeline.from_pipe(stock))

    text = stock.encode_prompt(PROMPTS[0], "cpu", 1, True)

    def scaled() -> torch.Tensor:
        call = {"height": 128, "width": 128, "num_inference_steps": 4, "generator": generators(0), "output_type": "latent"}
        return attention_scaling.sample(three, PROMPTS[0], **call).images

    work = [lambda: sample(one, steps=4), lambda: sample(two, steps=4), lambda: base_bits(stock, text), scaled]
    expected = [job() for job in work]
    start = threading.Barrier(5)

    def interrupted() -> None:
        start.wait()
        with pytest.raises(KeyboardInterrupt):
            bits(one, callback_on_step_end=raising(KeyboardInterrupt, 4))

    def started(job):
        start.wait()
        return job()

    with ThreadPoolExecutor(5) as pool:
        stopped = pool.submit(interrupted)
        results = list(pool.map(started, work))
        stopped.result()
    assert [torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True)] == [True] * 4
    before.before["scheduler"] = before.now()["scheduler"]  # the stock pipeline's call sets its own anew
    before.check()


def test_threads_encode_text_at_once(monkeypatch):
    """A fast tokenizer keeps the padding of the call under way. Four threads that lose their turn whenever it was set get the same text, padded, every time."""
    pipeline = quiet(SelfCascadePipeline.from_pipe(stock_base("small")))
    set_padding, start = pipeline.tokenizer.set_truncation_and_padding, threading.Barrier(4)

    def set_and_lose_turn(*args, **kwargs) -> None:
        set_padding(*args, **kwargs)
        time.sleep(0.002)

    monkeypatch.setattr(pipeline.tokenizer, "set_truncation_and_padding", set_and_lose_turn)

    @torch.no_grad()
    def text() -> torch.Tensor:
        return encode(pipeline, pipeline.spec.family, prompt=["a red cat"], negative_prompt=None, per_prompt=1, guided=True).text

    def texts() -> list[torch.Tensor]:
        start.wait()
        return [text() for _ in range(10)]

    expected = text()
    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(texts) for _ in range(4)]]
    assert all(torch.equal(one, expected) for several in found for one in several)


@torch.no_grad()
def test_a_pass_of_the_users_own_survives_another_thread_that_detaches():
    """In the middle of it, when torch has a hook in hand already: here the user's hooks detach, before the pass and in a block of it."""
    unet, call = models.unet("small"), case("small")
    expected = stock_pass(unet, **call)
    for module, register in ((unet, "register_forward_pre_hook"), (unet.down_blocks[0], "register_forward_hook")):
        with ExitStack() as others:
            handle = getattr(module, register)(lambda *_: others.close())
            others.enter_context(attached(unet))
            assert torch.equal(stock_pass(unet, **call), expected)
            handle.remove()


# ---- copies, folders, the store ----


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipeline: pickle.loads(pickle.dumps(pipeline))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_a_copy_of_a_pipeline_is_a_pipeline_of_its_own(kind, copied):
    """Outside a call: the copy has networks of its own, which sample the same bits and may be changed alone."""
    pipeline = cascade(stock_base(kind))
    twin = quiet(copied(pipeline))  # before the first call, since transformers then leaves hooks on SDXL's encoders that do not pickle
    expected = bits(pipeline)
    assert torch.equal(bits(twin), expected)
    with torch.no_grad():
        for parameter in (*twin.unet.parameters(), *twin.upsampler.parameters()):
            parameter.zero_()
    assert torch.equal(bits(pipeline), expected)


@pytest.mark.parametrize("kind", ["small", "sdxl"])
@pytest.mark.parametrize("tuned", ["no", "one", "set"])
def test_a_saved_pipeline_is_the_pipeline(tmp_path, kind, tuned):
    """With and without upsamplers, after the user changed the scheduler: the same bits; what diffusers loads of the base is the same base."""
    pipeline = cascade(stock_base(kind))
    one = pipeline.upsampler
    pipeline.register_modules(upsampler={"no": None, "one": one, "set": UpsamplerSet.holding({1: one, 2: one})}[tuned])
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "saved")
    again = quiet(SelfCascadePipeline.from_pretrained(tmp_path / "saved"))
    assert type(again.upsampler) is type(pipeline.upsampler)
    assert type(again.scheduler) is EulerDiscreteScheduler
    assert torch.equal(sample(again, steps=2, size=192), sample(pipeline, steps=2, size=192))
    theirs, unchecked = (StableDiffusionXLPipeline, {}) if kind == "sdxl" else (StableDiffusionPipeline, {"safety_checker": None, "feature_extractor": None})
    stock = quiet(theirs.from_pretrained(tmp_path / "saved", **unchecked))
    assert torch.equal(base_bits(stock), base_bits(quiet(SelfCascadePipeline.from_pipe(pipeline))))


def test_a_pipeline_goes_through_the_store(tmp_path, monkeypatch, store: Store):
    """Base and upsampler put as artifacts, then loaded by name on a machine without either: the same bits, and each knows whose it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipeline = cascade(stock_base("small"))
    SelfCascadePipeline.from_pipe(stock_base("small")).save_pretrained(tmp_path / "base")
    base = put(store, "bases", "mine", tmp_path / "base")
    pipeline.upsampler.register_to_config(base=f"mine@{base}")
    pipeline.upsampler.save_pretrained(tmp_path / "phi")
    put(store, "upsamplers", "phi", tmp_path / "phi")
    loaded = quiet(SelfCascadePipeline.from_pretrained("bases/mine", upsampler="upsamplers/phi", store=store))
    assert loaded.config.base == loaded.upsampler.config.base == f"mine@{base}"
    assert isinstance(loaded.vae, AutoencoderKL)
    assert isinstance(loaded.upsampler, FeatureUpsampler)
    assert torch.equal(bits(loaded), bits(pipeline))


def put(store: Store, kind, name: str, folder) -> str:
    """The files of a folder as an artifact; its version."""
    artifact = Artifact.plan(store, kind, name, BaselineSettings(), {"folder": name})
    with artifact.writing():
        for path in folder.rglob("*"):
            if path.is_file():
                artifact.put(path.relative_to(folder).as_posix(), path)
        return artifact.publish(counts={}).version
