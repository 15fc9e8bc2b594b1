"""The same pictures and weights give torch-fidelity, clean-fid, torchmetrics and prdc the numbers that they give us: `make test-peers`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_weights import save_inception, save_pictures
from PIL import Image
from torch import nn

from selfcascade.config import EvaluationSettings, FeatureSettings
from selfcascade.evaluation.comparison import Compared, compare
from selfcascade.evaluation.features import as_batch, load_features
from selfcascade.evaluation.intervals import GramBlock
from selfcascade.evaluation.manifold import manifold
from selfcascade.evaluation.resize import resize

PEERS = ("torch_fidelity", "cleanfid", "prdc")
pytestmark = pytest.mark.skipif(any(find_spec(name) is None for name in PEERS), reason="other tools of evaluation are installed by `make test-peers`")

COUNT, SIDE = 24, 96


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Real pictures, and generated ones that are like them, a little coarser and noisy."""
    home = tmp_path_factory.mktemp("pictures")
    return save_pictures(home / "real", COUNT, seed=0, side=SIDE), save_pictures(home / "generated", COUNT, seed=7, side=SIDE, coarse=5, noise=8)


def settings(weights: Path, rule: str) -> EvaluationSettings:
    return EvaluationSettings(features=FeatureSettings(network="inception-v3", weights=weights, batch=8, resize=rule), seed=5)


@pytest.fixture(scope="module")
def ours(weights, folders):
    """By rule: the comparison of the folders, and the features of both."""
    found: dict[str, tuple[Compared, torch.Tensor, torch.Tensor]] = {}

    def of(rule: str) -> tuple[Compared, torch.Tensor, torch.Tensor]:
        if rule not in found:
            chosen = settings(weights, rule)
            (row,) = compare(chosen, [str(folder) for folder in folders], lambda: pytest.fail("no store is needed"), device="cpu").rows
            found[rule] = row, *(features(chosen, folder) for folder in folders)
        return found[rule]

    return of


def features(chosen: EvaluationSettings, folder: Path) -> torch.Tensor:
    network = load_features(chosen.features)
    pictures = as_batch([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    return torch.cat([network(part) for part in pictures.split(8)])


@pytest.fixture(scope="module")
def fidelity(weights, folders):
    import torch_fidelity

    real, generated = map(str, folders)
    return torch_fidelity.calculate_metrics(
        input1=generated, input2=real, cuda=False, isc=True, fid=True, kid=True, prc=True, kid_subset_size=COUNT, kid_subsets=1, rng_seed=5, verbose=False,
        save_cpu_ram=True, feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), batch_size=8, cache=False,
    )  # fmt: skip


def test_torch_fidelity_has_our_numbers_by_its_resize(ours, fidelity):
    """FID, Inception score and its spread over the same seeded splits, precision and recall: 1e-4 relative; KID of one subset, the whole set: 1e-6."""
    row, real, generated = ours("tensorflow")
    assert row.fid == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-4)
    assert row.inception_score == pytest.approx(fidelity["inception_score_mean"], rel=1e-4) != pytest.approx(1, abs=0.05)
    assert row.inception_spread == pytest.approx(fidelity["inception_score_std"], rel=1e-3)
    assert (row.precision, row.recall) == (pytest.approx(fidelity["precision"], rel=1e-4), pytest.approx(fidelity["recall"], rel=1e-4))
    assert 0 < row.precision < 1 or 0 < row.recall < 1
    assert float(GramBlock.of(generated, real).kid()) == pytest.approx(fidelity["kernel_inception_distance_mean"], abs=1e-6)


def test_another_resize_is_another_number(ours, fidelity):
    """What the switch is for: by the clean resize FID differs from torch-fidelity's by far more than rounding."""
    assert ours("clean")[0].fid != pytest.approx(fidelity["frechet_inception_distance"], rel=1e-2)


def test_clean_fid_has_our_numbers_by_its_own_resize(weights, folders, ours):
    """FID and KID to 1e-4 relative, with our network given to it: pictures come from its reader and Pillow's resize."""
    from cleanfid import fid

    row, real, generated = ours("clean")
    body = load_features(settings(weights, "clean").features).body
    kept = []

    def extract(pictures: torch.Tensor) -> torch.Tensor:
        kept.append(body(pictures))
        return kept[-1]

    options = {"num_workers": 0, "batch_size": 8, "device": torch.device("cpu"), "verbose": False}
    found = fid.compute_fid(str(folders[1]), str(folders[0]), mode="clean", custom_feat_extractor=extract, use_dataparallel=False, **options)
    assert row.fid == pytest.approx(found, rel=1e-4)
    theirs = torch.cat(kept).double().numpy()
    kernel = fid.kernel_distance(theirs[:COUNT], theirs[COUNT:], num_subsets=1, max_subset_size=COUNT)
    assert float(GramBlock.of(generated, real).kid()) == pytest.approx(kernel, rel=1e-4)


@pytest.mark.parametrize(("antialias", "rule"), [(True, "bilinear"), (False, "tensorflow")])
def test_torchmetrics_has_our_features_by_its_resizes(weights, folders, antialias, rule):
    """Its own Inception-v3, both ways that it knows to resize: 1e-3 of the features' spread over pictures. By the other way they differ by more than that."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights), antialias=antialias)
    pictures = as_batch([np.asarray(Image.open(path)) for path in sorted(folders[1].iterdir())[:3]])
    with torch.inference_mode():
        expected = theirs(pictures)
    gaps = {name: load_features(settings(weights, name).features)(pictures) - expected for name in ("bilinear", "tensorflow")}
    close = {name: float(gap.abs().max()) < 1e-3 * float(expected.std(dim=0).mean()) for name, gap in gaps.items()}
    assert close == {"bilinear": antialias, "tensorflow": not antialias}


def test_prdc_has_our_precision_recall_density_and_coverage(ours):
    """Each at its own count of neighbours, to 1e-4."""
    from prdc import compute_prdc

    _, real, generated = ours("clean")
    found = manifold(real, generated)
    pair = (real.double().numpy(), generated.double().numpy())
    near, far = compute_prdc(*pair, nearest_k=3), compute_prdc(*pair, nearest_k=5)
    assert (found.precision, found.recall) == (pytest.approx(near["precision"], rel=1e-4), pytest.approx(near["recall"], rel=1e-4))
    assert (found.density, found.coverage) == (pytest.approx(far["density"], rel=1e-4), pytest.approx(far["coverage"], rel=1e-4))
    assert found.coverage > 0


def test_our_aliased_resize_is_torch_fidelitys():
    """Larger and smaller, odd sizes: the same pixels to 1e-4 of 255."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    for height, width in ((96, 96), (40, 700), (299, 31), (1024, 513)):
        pictures = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(height), dtype=torch.uint8)
        expected = interpolate_bilinear_2d_like_tensorflow1x(pictures.float(), size=(299, 299), align_corners=False)
        assert float((resize(pictures, (299, 299), "tensorflow") - expected).abs().max()) < 1e-4 * 255


def test_our_network_is_torch_fidelitys(weights):
    """Features and logits without bias of pictures at the network's own size: 1e-3 of their spread over pictures."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    from selfcascade.evaluation.networks.inception import URL

    assert URL == URL_INCEPTION_V3
    theirs: nn.Module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    network = load_features(FeatureSettings(network="inception-v3", weights=weights))
    pictures = torch.randint(0, 256, (3, 3, 299, 299), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures[1:] //= 3
    with torch.inference_mode():
        expected, logits = theirs(pictures)
        found = network(pictures)
        classes = network.logits(found)
    for one, other in ((found, expected), (classes, logits)):
        assert float((one - other).abs().max()) < 1e-3 * float(other.std(dim=0).mean())
