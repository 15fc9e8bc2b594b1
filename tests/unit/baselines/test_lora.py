"""LoRA on every linear layer: the paper's counts, the base at first, merged as unmerged, and as stock diffusers loads it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import full, lora
from selfcascade.baselines.finetune import FILES, RECORD, Finetune, Record, find_finetune
from selfcascade.cascade.ladder import lora_parameters
from selfcascade.cascade.published import PUBLISHED, published_unet
from selfcascade.settings import SettingsError

SIDE = 2 * models.NATIVE
CALL = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "guidance_scale": 3.0}


def inputs(unet: torch.nn.Module, kind: str, *, batch: int = 2, seed: int = 0) -> dict[str, object]:
    """What the UNet's forward takes."""
    draws = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 12, unet.config.cross_attention_dim, generator=draws)
    given = {"sample": torch.randn(batch, 4, 16, 16, generator=draws), "timestep": torch.arange(batch) + 7, "encoder_hidden_states": text}
    if kind == "sdxl":
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, models.TEXT, generator=draws), "time_ids": torch.ones(batch, 6)}
    return given


def trained_on(unet: torch.nn.Module, rank: int = 4, *, seed: int = 0, base: str | None = None) -> lora.Lora:
    """A LoRA that adds something: all of its numbers are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = lora.Lora.on(lora.shared(unet), rank, base=base, size=(SIDE, SIDE))
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return adapter


@pytest.mark.parametrize(("rank", "count"), [(4, 1_938_432), (32, 15_507_456)])
def test_counts_on_stable_diffusion_21(rank: int, count: int) -> None:
    """peft's own layers on the real UNet hold 484,608 numbers a rank: the paper's 1.9M and 15M. Nothing else of the 866 million trains."""
    with torch.device("meta"):
        unet = published_unet("sd-2.1-base")
        adapter = lora.Lora.on(unet, rank)
    assert sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad) == count
    assert sum(parameter.numel() for parameter in adapter.parameters()) == count == 484_608 * rank
    assert sum(parameter.numel() for parameter in unet.parameters()) == PUBLISHED["sd-2.1-base"].parameters + count


@pytest.mark.parametrize(("kind", "rank"), [("small", 1), ("sd21", 4), ("sdxl", 3)])
def test_every_linear_layer_and_nothing_else(kind: str, rank: int) -> None:
    """Each gets one A and one B of its own shape; the ladder counts them without peft."""
    stock = models.unet(kind)
    weights = trained_on(stock, rank).weights()
    shapes = {name: (m.in_features, m.out_features) for name, m in stock.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        f"{name}.lora_{side}.weight": (rank, m) if side == "A" else (n, rank) for name, (m, n) in shapes.items() for side in "AB"
    }
    assert sum(tensor.numel() for tensor in weights.values()) == lora_parameters(stock, rank)


@pytest.mark.parametrize("kind", models.KINDS)
def test_a_fresh_one_is_the_base(kind: str) -> None:
    """Although A is random. To float tolerance: matrix kernels may depend on where in memory their input lies."""
    stock = models.unet(kind)
    unet = lora.shared(stock)
    adapter = lora.Lora.on(unet, 4)
    assert any(tensor.any() for tensor in adapter.weights().values())
    given = inputs(stock, kind)
    torch.testing.assert_close(unet(**given)[0], stock(**given)[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["small", "sdxl"])
@torch.no_grad()
def test_merged_is_unmerged(kind: str) -> None:
    """W + B A in place of W, worked out by hand for every layer, gives the same output to 1e-5, another than the base's; so does diffusers' fuse_lora."""
    stock = models.unet(kind)
    given = inputs(stock, kind)
    before = stock(**given)[0]
    adapter = trained_on(stock)
    unmerged = adapter.added_to(stock)
    expected = unmerged(**given)[0]
    assert (expected - before).abs().max() > 0.05
    assert torch.equal(stock(**given)[0], before)
    weights = adapter.weights()
    merged = models.unet(kind)
    for name, module in merged.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight += weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
    torch.testing.assert_close(merged(**given)[0], expected, atol=1e-5, rtol=1e-5)
    unmerged.fuse_lora()
    torch.testing.assert_close(unmerged(**given)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["small", "sdxl"])
@torch.no_grad()
def test_what_trains_is_what_is_loaded(kind: str) -> None:
    """The UNet that runs with the parameters in training predicts what one predicts that diffusers adds the saved numbers to."""
    stock = models.unet(kind)
    unet = lora.shared(stock)
    adapter = lora.Lora.on(unet, 4)
    draws = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        parameter.normal_(std=0.1, generator=draws)
    given = inputs(stock, kind)
    torch.testing.assert_close(unet(**given)[0], adapter.added_to(stock)(**given)[0], atol=1e-5, rtol=1e-5)


@given(rank=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(tmp_path_factory: pytest.TempPathFactory, rank: int, seed: int) -> None:
    """Every number and the record; a UNet with it predicts what the one with the original does; equal LoRAs make equal bytes."""
    stock = models.unet("small")
    adapter = trained_on(stock, rank, seed=seed, base="b@1")
    folders = [tmp_path_factory.mktemp("lora") for _ in range(2)]
    for folder in folders:
        adapter.save_pretrained(folder)
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert set(files[0]) == {*FILES["lora"], RECORD}
    loaded = lora.Lora.from_pretrained(folders[0])
    assert loaded.record == Record(way="lora", base="b@1", size=(SIDE, SIDE), rank=rank)
    original, again = adapter.weights(), loaded.weights()
    assert original.keys() == again.keys()
    assert all(torch.equal(original[name], again[name]) for name in original)
    given = inputs(stock, "small")
    own = lora.adapted(stock, find_finetune(str(folders[0]), "lora"))
    assert torch.equal(own(**given)[0], adapter.added_to(stock)(**given)[0])


@torch.no_grad()
def test_a_lora_of_another_trainer_counts_too(tmp_path: Path) -> None:
    """One layer alone, under the names that kohya's trainer gives, with a factor alpha / rank: the UNet is the one with W + alpha / rank * B A there."""
    stock = models.unet("sd21")
    layer = stock.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    files = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    folder = folder_of(tmp_path / "kohya", {FILES["lora"][0]: files})
    given = inputs(stock, "sd21")
    found = lora.adapted(stock, find_finetune(str(folder), "lora"))(**given)[0]
    before = stock(**given)[0]
    layer.weight += 0.5 * up @ down
    expected = stock(**given)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_a_stock_pipeline_loads_it_unchanged(kind: str, tmp_path: Path) -> None:
    """``load_lora_weights`` of diffusers' own pipeline on the folder, then its own sampling at the target size: the pictures of the baseline, to 1e-5.
    The stock pipeline in a cascade, LoRA and all, gives its own bit for bit; without the LoRA they are others."""
    stock = models.base(kind)
    stock.scheduler = models.base("small").scheduler
    stock.set_progress_bar_config(disable=True)
    cascade = SelfCascadePipeline.from_pipe(stock)
    cascade.set_progress_bar_config(disable=True)
    trained_on(stock.unet).save_pretrained(tmp_path)

    def drawn(sampler, *given, **call):
        return torch.as_tensor(sampler(*given, "a red cat", **CALL, **call, eta=0.0, generator=torch.Generator().manual_seed(3), output_type="pt").images)

    ours, base = drawn(lora.sample, cascade, adapter=tmp_path), drawn(cascade, sizes=[(SIDE, SIDE)])
    stock.load_lora_weights(tmp_path)
    theirs = drawn(stock)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert torch.equal(drawn(lora.sample, SelfCascadePipeline.from_pipe(stock)), theirs)
    assert not torch.allclose(base, ours, atol=1e-2)


@pytest.mark.parametrize("way", ["lora", "full"])
def test_one_picture_is_the_same_in_a_batch_of_four(way: str, tmp_path: Path) -> None:
    """To float tolerance; with eta 1, whose noise every sample draws for itself."""
    cascade = SelfCascadePipeline.from_pipe(models.base("small"))
    cascade.set_progress_bar_config(disable=True)
    trained_on(cascade.unet).save_pretrained(tmp_path)
    tuned = {"adapter": tmp_path} if way == "lora" else {"unet": models.unet("small", seed=5)}
    sample = lora.sample if way == "lora" else full.sample

    def latents(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(cascade, prompts, **CALL, **tuned, generator=generators, output_type="latent").images

    four = latents(["a red cat", "sun", "two blue dog", "a house"], [0, 1, 2, 3])
    torch.testing.assert_close(latents(["two blue dog"], [2])[0], four[2], atol=1e-4, rtol=1e-4)


def test_full_is_the_stock_pipeline_with_that_unet(tmp_path: Path) -> None:
    """From a folder or as a module; the pipeline that was given keeps its own."""
    stock = models.base("small")
    stock.set_progress_bar_config(disable=True)
    cascade = SelfCascadePipeline.from_pipe(stock)
    cascade.set_progress_bar_config(disable=True)
    other = models.unet("small", seed=5)
    other.save_pretrained(tmp_path)
    own = cascade.unet

    def drawn(sampler, *given, **call):
        return torch.as_tensor(sampler(*given, "sun", **CALL, **call, eta=0.0, generator=torch.Generator().manual_seed(3), output_type="pt").images)

    found = [drawn(full.sample, cascade, unet=unet) for unet in (tmp_path, other)]
    assert cascade.unet is own
    untuned = drawn(stock)
    stock.unet = other
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], drawn(stock))
    assert not torch.allclose(found[0], untuned, atol=1e-2)


def folder_of(path: Path, files: dict[str, bytes | dict[str, torch.Tensor] | str]) -> Path:
    path.mkdir()
    for name, content in files.items():
        if isinstance(content, dict):
            safetensors.torch.save_file(content, path / name)
        elif isinstance(content, str):
            (path / name).write_text(content)
        else:
            (path / name).write_bytes(content)
    return path


def test_refusals_are_one_line(tmp_path: Path) -> None:
    """What is missing, of another base or shape, or something else; each names what was given and the way out."""
    cascade = SelfCascadePipeline.from_pipe(models.base("small"))
    cascade.register_to_config(base="tiny@1")
    trained_on(models.unet("sd21")).save_pretrained(tmp_path / "sd21")
    trained_on(cascade.unet, base="other@2").save_pretrained(tmp_path / "other")
    models.unet("sd21").save_pretrained(tmp_path / "unet")
    name = FILES["lora"][0]
    folder_of(tmp_path / "empty", {"README.md": ""})
    folder_of(tmp_path / "text", {name: {"text_encoder.layer.lora_A.weight": torch.ones(1, 2), "unet.x.lora_A.weight": torch.ones(1, 2)}})
    folder_of(tmp_path / "pickled", {"pytorch_lora_weights.bin": b"\x80"})
    folder_of(tmp_path / "damaged", {name: b"no tensors"})
    folder_of(tmp_path / "record", {name: {"unet.x.lora_A.weight": torch.ones(1, 2)}, RECORD: json.dumps({"way": "sideways"})})
    for sample, argument, folder, message in (
        (lora.sample, "adapter", None, r"^method 'lora' needs a LoRA in the UNet; set generation\.finetuned \(adapters/NAME or a folder\), or give adapter=$"),
        (lora.sample, "adapter", "none", r"is neither a folder nor an artifact \(adapters/NAME\)$"),
        (lora.sample, "adapter", "empty", rf"^LoRA '.*' has no {name}$"),
        (lora.sample, "adapter", "unet", rf"^LoRA '.*' has no {name}; it holds a fine-tuned UNet: use method 'full'$"),
        (lora.sample, "adapter", "pickled", rf"has no {name}$"),
        (lora.sample, "adapter", "damaged", r"^LoRA '.*' does not load into the base's UNet: "),
        (lora.sample, "adapter", "record", rf"^LoRA '.*' has a damaged {RECORD}: .*; get it anew$"),
        (lora.sample, "adapter", "text", r"holds weights of text_encoder; the baseline takes one of the UNet alone$"),
        (lora.sample, "adapter", "other", r"^LoRA '.*' was trained for base 'other@2' but the pipeline holds 'tiny@1'; retrain it or pass --base other$"),
        (lora.sample, "adapter", "sd21", r"is for layers that the base's UNet does not have, such as .*; choose one of this base$"),
        (full.sample, "unet", "none", r"is neither a folder nor an artifact \(unets/NAME\)$"),
        (full.sample, "unet", "sd21", r"^fine-tuned UNet '.*' has no config\.json; it holds a LoRA: use method 'lora'$"),
        (full.sample, "unet", "unet", r"^fine-tuned UNet '.*' has the shape of another base than the pipeline's; choose one that was trained from this base$"),
    ):
        with pytest.raises(SettingsError, match=message) as caught:
            sample(cascade, "sun", **CALL, **({} if folder is None else {argument: tmp_path / folder}))
        assert "\n" not in str(caught.value)
    assert not getattr(cascade.unet, "peft_config", None)


def test_a_second_lora_is_refused(tmp_path: Path) -> None:
    stock = models.base("small")
    trained_on(stock.unet).save_pretrained(tmp_path)
    stock.load_lora_weights(tmp_path)
    with pytest.raises(SettingsError, match="has a LoRA already; unload it"):
        lora.sample(SelfCascadePipeline.from_pipe(stock), "sun", **CALL, adapter=tmp_path)


def test_without_peft_all_else_works() -> None:
    """In a process where peft cannot be imported: the library imports, and what needs LoRA says in one line which extra to install."""
    code = """
        import sys
        sys.modules["peft"] = None
        import selfcascade
        from selfcascade.adaptation import adapt, requirements
        from selfcascade.baselines import lora
        from selfcascade.baselines.registry import BASELINES
        from selfcascade.config import AdaptationSettings, BaselineSettings
        from selfcascade.settings import SettingsError
        requirements.check_packages(AdaptationSettings(trainable="full"))
        print(BASELINES["lora"].refusal(None, 64, 64, BaselineSettings()))
        try:
            requirements.check_packages(AdaptationSettings(trainable="lora"))
        except SettingsError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["LoRA needs the package peft, which is not installed; pip install 'selfcascade[lora]'"] * 2


def test_the_version_is_that_of_what_is_read(tmp_path: Path) -> None:
    """A note beside the weights does not change it; one number of them does."""
    stock = models.unet("small")
    adapter = trained_on(stock)
    adapter.save_pretrained(tmp_path)
    found = find_finetune(str(tmp_path), "lora")
    before = found.version
    (tmp_path / "README.md").write_text("a note")
    assert found.version == before
    with torch.no_grad():
        next(iter(adapter.parameters())).view(-1)[0] += 1
    adapter.save_pretrained(tmp_path)
    assert found.version != before
    assert Finetune(tmp_path, "x", Record(way="lora", base="a@1")).check_base("a@1") is None
