"""fastai's own `vision_learner` and `unet_learner` with the networks of the family."""

import importlib
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from r2kit.backbones import create_model
from r2kit.backbones.weights import adapt_first_conv, save_weights
from r2kit.catalog import CATALOG
from r2kit.errors import MissingExtraError, ModelError
from tests.fastai.marks import FASTAI

pytestmark = FASTAI

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# One of each shape of network: deep stem, big and little branches, trees, three stages, pooled scales, split attention.
KINDS = ["res2netplus50d", "blres2net50", "dla60_res2net", "cifar_res2next29_6c24w4s", "scalenet50_light", "resnest14d"]


@pytest.fixture
def dls(fa, image_folder, tmp_path):
    """Three classes, two training batches of four, four images to validate."""
    files = [file for folder in sorted(image_folder.iterdir()) for file in sorted(folder.iterdir())[:4]]
    return fa.ImageDataLoaders.from_lists(
        tmp_path,
        files,
        [file.parent.name for file in files],
        valid_pct=0.34,
        seed=1,
        item_tfms=fa.Resize(32),
        bs=4,
        num_workers=0,
        device=torch.device("cpu"),
    )


def band_dls(fa, bands: int):
    """Four images of noise with that many bands, and their classes."""
    torch.manual_seed(0)
    pairs = [(torch.randn(bands, 32, 32), torch.tensor(i % 2)) for i in range(4)]
    made = fa.DataLoaders.from_dsets(pairs, pairs, bs=4, num_workers=0, device=torch.device("cpu"))
    made.c = 2
    return made


def normalisations(fa, dls) -> list[tuple[list[float], list[float]]]:
    found = [tfm for tfm in dls.after_batch.fs if isinstance(tfm, fa.Normalize)]
    return [(tfm.mean.flatten().tolist(), tfm.std.flatten().tolist()) for tfm in found]


def names_of_groups(learn) -> list[set[str]]:
    """For each parameter group the names, to two levels, of the modules it holds."""
    names = {id(parameter): name for name, parameter in learn.model.named_parameters()}
    if learn.opt is None:
        learn.create_opt()
    return [{".".join(names[id(p)].split(".")[:2]) for p in group} for group in learn.opt.param_lists]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def file_of_three_bands(tmp_path_factory) -> Path:
    """Weights of the family's smallest network, with statistics of their own."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "resnest14d.safetensors"
    preprocess = {"mean": [0.3, 0.4, 0.5], "std": [0.1, 0.2, 0.3], "interpolation": "bicubic"}
    save_weights(create_model("resnest14d", num_classes=7), path, {"preprocess": preprocess})
    return path


# -- archs and what fastai knows of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [entry.name for entry in CATALOG])
def test_every_name_is_a_function_that_fastai_knows(fa, name):
    arch = getattr(fa, name)
    assert arch.__name__ == name
    assert f"`{name}`" in arch.__doc__
    assert pickle.loads(pickle.dumps(arch)) is arch
    meta = fa.model_meta[arch]
    assert meta is fa.model_meta[name]
    assert meta["split"] is fa.three_groups
    cfg = timm.get_pretrained_cfg(name)
    assert meta["stats"] == (cfg.mean, cfg.std)
    assert fa.model_meta[f"{name}.{cfg.tag}"] is meta


@pytest.mark.parametrize("name", KINDS)
def test_the_body_is_the_network_up_to_its_pool(fa, name):
    model = getattr(fa, name)(False, num_classes=5).eval()
    body = fa.cut_body(model).eval()
    assert type(body) is nn.Sequential
    side = 8 if name.startswith("cifar") else 32
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        assert torch.equal(body(images), model.forward_features(images))
    head = nn.Linear(2, 2)
    groups = fa.three_groups(nn.Sequential(body, head))
    assert len(groups) == 3
    assert all(len(group) for group in groups)
    ids = [id(parameter) for group in groups for parameter in group]
    backbone = [p for n, p in model.named_parameters() if not n.startswith("fc.")]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in [*backbone, *head.parameters()]}


def test_an_arch_is_called_as_fastai_calls_it_and_refuses_unknown_options(fa, file_of_three_bands):
    with pytest.warns(UserWarning, match="mean \\[0.3, 0.4, 0.5\\] and std"):
        by_position = fa.resnest14d(file_of_three_bands, num_classes=2)
    with pytest.warns(UserWarning, match="which fastai cannot know"):
        by_keyword = fa.resnest14d(pretrained=str(file_of_three_bands), num_classes=2)
    assert torch.equal(by_position.conv1[0].weight, by_keyword.conv1[0].weight)
    with pytest.raises(ModelError, match=r"no option 'drop_paht_rate'; did you mean 'drop_path_rate'\?"):
        fa.resnest14d(drop_paht_rate=0.1)


def test_without_fastai_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastai", None)
    monkeypatch.delitem(sys.modules, "r2kit.fastai", raising=False)
    with pytest.raises(MissingExtraError, match=r'r2kit.fastai needs fastai, .*: pip install "r2kit\[fastai\]"'):
        importlib.import_module("r2kit.fastai")


# -- learners ----------------------------------------------------------------------------------------------------------


def test_by_function_and_by_name_it_is_the_same_learner(fa, dls):
    by_function = fa.vision_learner(dls, fa.res2netplus50, pretrained=False)
    by_name = fa.vision_learner(dls, "res2netplus50", pretrained=False)
    shapes = [{k: t.shape for k, t in learn.model.state_dict().items()} for learn in (by_function, by_name)]
    assert shapes[0] == shapes[1]
    early = {"0.conv1", "0.bn1", "0.layer1", "0.layer2"}
    for learn in (by_function, by_name):
        first, second, head = names_of_groups(learn)
        assert (first, second) == (early, {"0.layer3", "0.layer4"})
        assert head
        assert all(name.startswith("1.") for name in head)
    assert not normalisations(fa, dls)  # fastai's own: random weights want nothing


def test_timm_s_own_function_is_an_arch(fa, dls):
    learn = fa.vision_learner(dls, timm.model_entrypoint("scalenet50_light"), pretrained=False)
    assert names_of_groups(learn)[1] == {"0.layer3", "0.layer4"}


def test_names_outside_the_family_are_still_fastai_s(fa, dls):
    learn = fa.vision_learner(dls, "test_resnet", pretrained=False, custom_head=nn.Sequential(fa.Flatten()), n_out=2)
    assert type(learn.model[0]).__name__ == "TimmBody"
    assert type(learn.model[1][0]).__name__ == "Flatten"


def test_weights_that_nobody_published_do_not_stop_the_first_line(fa, dls):
    with pytest.warns(UserWarning, match="no weights of 'res2netplus50' have been published: it starts from random"):
        learn = fa.vision_learner(dls, "res2netplus50")
    assert len(names_of_groups(learn)) == 3


@pytest.mark.parametrize("by_name", [False, True])
def test_published_weights_out_of_reach_are_one_line(fa, dls, monkeypatch, tmp_path, by_name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids to fetch the weights of 'res2net50d'"):
        fa.vision_learner(dls, "res2net50d" if by_name else fa.res2net50d)


@pytest.mark.parametrize("by_name", [False, True])
def test_published_weights(fa, dls, monkeypatch, file_of_three_bands, by_name):
    whole = file_of_three_bands.with_name("cached.safetensors")
    save_weights(create_model("resnest14d"), whole)
    monkeypatch.setattr("r2kit.backbones.create.locate", lambda *_: whole)
    learn = fa.vision_learner(dls, "resnest14d.gluon_in1k" if by_name else fa.resnest14d)
    expected = {key: tensor for key, tensor in load_file(whole).items() if not key.startswith("fc.")}
    found = learn.model[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    ((mean, std),) = normalisations(fa, dls)
    assert mean == pytest.approx(IMAGENET[0])
    assert std == pytest.approx(IMAGENET[1])


def test_by_name_a_file_brings_its_own_statistics(fa, dls, file_of_three_bands):
    fa.vision_learner(dls, "resnest14d", pretrained=file_of_three_bands)
    ((mean, std),) = normalisations(fa, dls)
    assert mean == pytest.approx([0.3, 0.4, 0.5])
    assert std == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.filterwarnings("ignore:the weights in .* want images with mean")  # has its test above
@pytest.mark.parametrize("bands", [1, 13])
@pytest.mark.parametrize("by_name", [False, True])
def test_bands_other_than_three_start_from_adapted_weights(fa, file_of_three_bands, bands, by_name):
    source = create_model("resnest14d", pretrained=file_of_three_bands, num_classes=0).conv1[0].weight
    arch = "resnest14d" if by_name else fa.resnest14d
    dls = band_dls(fa, bands)
    learn = fa.vision_learner(dls, arch, n_in=bands, pretrained=file_of_three_bands, loss_func=nn.CrossEntropyLoss())
    kernels = learn.model[0].conv1[0].weight
    assert kernels.shape[1] == bands
    expected, _ = adapt_first_conv(source, torch.zeros_like(kernels))
    torch.testing.assert_close(kernels.detach(), expected.detach())
    assert not normalisations(fa, dls)  # RGB statistics are not those of other bands
    if by_name:
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        assert all(parameter.isfinite().all() for parameter in learn.model.parameters())


def test_more_bands_without_weights_start_as_the_network_does(fa):
    model = fa.res2netplus50(False)
    stem = model.conv1[0]
    model.conv1[0] = nn.Conv2d(13, stem.out_channels, 3, stride=2, padding=1, bias=False)  # what fastai does
    kernels = fa.cut_body(model).conv1[0].weight
    assert kernels.shape[1] == 13
    assert kernels.std().item() == pytest.approx(stem.weight.std().item(), rel=0.1)  # He's, by fan-out


# -- a session ---------------------------------------------------------------------------------------------------------


def test_a_session_from_the_first_line_to_a_loaded_export(fa, dls, tmp_path):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="call learn.unfreeze\\(\\) before fitting"):
        # A plain optimizer, as lr_find and export write down what it remembers.
        learn = fa.vision_learner(dls, fa.res2netplus50, metrics=fa.accuracy, opt_func=fa.SGD)
    body, head = learn.model
    ((mean, _),) = normalisations(fa, dls)
    assert mean == pytest.approx(IMAGENET[0])

    with learn.no_bar(), learn.no_logging():
        # Frozen, as fastai freezes: the body's convolutions stand still, its BatchNorms learn.
        before, head_before = state_of(body), state_of(head)
        learn.fit(1, 1e-2)
        after = state_of(body)
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        norms = {f"{n}." for n, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert {f"{key.rpartition('.')[0]}." for key in moved} == norms
        assert not all(torch.equal(head_before[key], tensor) for key, tensor in head.state_dict().items())

        learn.fine_tune(1, 1e-2)
        assert learn.opt.frozen_idx == 0
        assert len(set(learn.opt.hypers.itemgot("lr"))) == 3  # early layers learn slowest
        after_fine_tune = body.state_dict()
        assert all(not torch.equal(after[key], after_fine_tune[key]) for key in after if "conv" in key)

        found = learn.lr_find(num_it=10, stop_div=False)
        assert 1e-7 < found.valley < 10

        learn.freeze()
        assert not body.conv1[0].weight.requires_grad
        assert body.bn1.weight.requires_grad
        learn.unfreeze()
        assert all(parameter.requires_grad for parameter in learn.model.parameters())

        learn.show_results(max_n=2)
        report = fa.ClassificationInterpretation.from_learner(learn)
        assert report.confusion_matrix().sum() == 4
        report.plot_top_losses(2)
        report.plot_confusion_matrix()
        fa.plt.close("all")

        probabilities, _ = learn.get_preds()
        learn.export("model.pkl")
    loaded = fa.load_learner(tmp_path / "model.pkl")
    assert loaded.splitter is fa.three_groups
    file, _ = dls.valid_ds.items[0]
    with loaded.no_bar(), loaded.no_logging():
        label, _, predicted = loaded.predict(file)
    assert label in dls.vocab
    torch.testing.assert_close(predicted, probabilities[0], atol=1e-5, rtol=1e-4)


def test_a_frozen_body_without_trained_norms_stands_wholly_still(fa, dls):
    learn = fa.vision_learner(
        dls, fa.resnest14d, pretrained=False, train_bn=False, cbs=fa.BnFreeze(), opt_func=partial(fa.SGD, mom=0.9)
    )
    learn.freeze()
    before = state_of(learn.model[0])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    after = learn.model[0].state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def mask_dls(fa, folder: Path, bands: int = 3):
    """Four images of noise and the masks of their bright pixels; with another number of bands, as tensors."""
    rng = np.random.default_rng(0)
    if bands != 3:
        images = [torch.from_numpy(rng.random((bands, 64, 64), dtype=np.float32)) for _ in range(4)]
        pairs = [(image, (image[0] > 0.5).long()) for image in images]
        made = fa.DataLoaders.from_dsets(pairs, pairs, bs=2, num_workers=0, device=torch.device("cpu"))
        made.c = 2
        return made
    for index in range(4):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        Image.fromarray((pixels[..., 0] > 128).astype(np.uint8)).save(folder / f"mask{index}.png")
    return fa.SegmentationDataLoaders.from_label_func(
        folder,
        [folder / f"{index}.png" for index in range(4)],
        lambda file: file.with_name(f"mask{file.name}"),
        codes=["low", "high"],
        valid_pct=0.5,
        bs=2,
        num_workers=0,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("name", ["res2netplus50", pytest.param("blres2net50", marks=pytest.mark.slow)])
def test_unet_learner_takes_a_step(fa, tmp_path, name):
    dls = mask_dls(fa, tmp_path)
    # A plain optimizer: this decoder has some 300 million parameters.
    learn = fa.unet_learner(dls, getattr(fa, name), pretrained=False, opt_func=fa.SGD)
    encoder = learn.model[0]
    _, second, decoder = names_of_groups(learn)
    assert second == {"layers.0"}
    assert {id(p) for p in [*learn.opt.param_lists[0], *learn.opt.param_lists[1]]} == set(map(id, encoder.parameters()))
    assert decoder
    assert "layers.0" not in decoder
    before = state_of(encoder.conv1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    assert learn.recorder.losses[0].isfinite()
    assert any(not torch.equal(before[key], tensor) for key, tensor in encoder.conv1.state_dict().items())
    with torch.no_grad():
        logits = learn.model.eval()(dls.valid.one_batch()[0])
    assert logits.shape == (2, 2, 64, 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the weights in .* want images with mean")  # has its test above
def test_unet_learner_of_four_bands_fine_tunes_from_a_file(fa, tmp_path, file_of_three_bands):
    dls = mask_dls(fa, tmp_path, bands=4)
    learn = fa.unet_learner(
        dls,
        fa.resnest14d,
        n_in=4,
        n_out=2,
        pretrained=file_of_three_bands,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=fa.SGD,
    )
    source = create_model("resnest14d", pretrained=file_of_three_bands, num_classes=0).conv1[0].weight
    kernels = learn.model[0].conv1[0].weight
    torch.testing.assert_close(kernels.detach(), adapt_first_conv(source.detach(), torch.zeros_like(kernels))[0])
    assert not kernels.requires_grad  # frozen until the second half of fine_tune
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-3)
    assert kernels.requires_grad
    assert len(set(learn.opt.hypers.itemgot("lr"))) == 3
    assert learn.recorder.losses[-1].isfinite()
