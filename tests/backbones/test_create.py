"""`create_model`: names, options, published weights without a network."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

import pytest
import timm
import torch
from timm.models import PretrainedCfg
from timm.models.resnet import ResNet

from r2kit.backbones import create_model
from r2kit.backbones.published import locate, weights_info
from r2kit.backbones.resnest import SplitAttentionBlock
from r2kit.backbones.weights import LoadReport, save_weights
from r2kit.errors import ModelError

SMALL = {"layers": (1, 2, 1, 1), "channels": (8, 16, 32, 64), "stem_width": 8}  # timm's ResNet, cut down


def small(name: str = "res2net50d", **options: object) -> torch.nn.Module:
    return create_model(name, **{**SMALL, **options})


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and an empty hub cache."""

    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


# -- names -------------------------------------------------------------------------------------------------------------


def test_builds_our_names_and_timms() -> None:
    model = create_model("res2netplus50", num_classes=7, in_chans=13, layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
    assert model(torch.zeros(1, 13, 64, 64)).shape == (1, 7)
    assert model.load_report is None
    assert isinstance(small(num_classes=0), ResNet)


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'res2netpluss50'; did you mean 'res2netplus50'"):
        create_model("res2netpluss50")
    with pytest.raises(ModelError, match="r2kit models"):
        create_model("xyzzy")


def test_unknown_tag_gives_the_existing_ones() -> None:
    with pytest.raises(ModelError, match=r"no weights tagged 'tv_in2k'; it has: .*did you mean 'tv_in1k'"):
        create_model("resnet50.tv_in2k")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": -1}, "num_classes: must be an integer >= 0, got -1"),
        ({"num_classes": 1.5}, "num_classes: must be an integer >= 0, got 1.5"),
        ({"in_chans": 0}, "in_chans: must be an integer >= 1, got 0"),
        ({"in_chans_rule": "averge"}, "in_chans_rule: got 'averge', allowed: repeat, mean, zero, random"),
    ],
)
def test_bad_numbers(options: dict, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        create_model("res2net50d", **options)


# -- options: nothing is ignored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("res2net50d", 0.1), ("res2netplus50", None)])
def test_unknown_option_names_the_nearest(name: str, value: float | None) -> None:
    with pytest.raises(ModelError, match=f"'{name}' has no option 'drop_pth_rate'; did you mean 'drop_path_rate'"):
        create_model(name, drop_pth_rate=value)


def test_a_model_that_swallows_options_is_not_believed() -> None:
    """A class of timm with a ``**kwargs`` sink builds with anything."""

    class Sink(ResNet):
        def __init__(self, **kwargs: object) -> None:
            super().__init__(timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8))

    def sink_net(pretrained: bool = False, pretrained_cfg: object = None, pretrained_cfg_overlay: object = None,
                 cache_dir: object = None, **kwargs: object) -> ResNet:  # fmt: skip
        return Sink(**kwargs)

    registry = timm.models._registry._model_entrypoints
    registry["sink_net"] = sink_net
    try:
        with pytest.raises(ModelError, match="'sink_net' has no option 'drop_pth_rate'"):
            create_model("sink_net", drop_pth_rate=0.5)
    finally:
        del registry["sink_net"]


def test_zero_needs_no_option_but_more_does() -> None:
    tiny = {"levels": (1, 1, 1, 1, 1, 1), "channels": (16, 32, 32, 32, 32, 32)}
    assert create_model("dla60_res2next", drop_path_rate=0.0, num_classes=2, **tiny).num_classes == 2
    with pytest.raises(ModelError, match="'dla60_res2next' has no option 'drop_path_rate'"):
        create_model("dla60_res2next", drop_path_rate=0.1)


def test_what_timm_refuses_is_one_clear_line() -> None:
    with pytest.raises(ModelError, match="'dla60_res2net' cannot be built with output_stride=16") as caught:
        create_model("dla60_res2net", output_stride=16)
    assert "\n" not in str(caught.value)


def test_weights_come_through_one_door() -> None:
    with pytest.raises(ModelError, match="checkpoint_path: not an option here; give the file with pretrained="):
        create_model("res2net50d", checkpoint_path="x.pth")
    with pytest.raises(ModelError, match="pretrained_cfg: not an option here"):
        create_model("res2net50d", pretrained_cfg="in1k")


def test_features_options_need_features_only() -> None:
    with pytest.raises(ModelError, match="out_indices: needs features_only=True"):
        create_model("res2net50d", out_indices=(1, 2))
    features = small(features_only=True, out_indices=(1, 3))(torch.zeros(1, 3, 64, 64))
    assert [f.shape[-1] for f in features] == [16, 4]


def test_block_args_are_checked_by_name() -> None:
    with pytest.raises(ModelError, match=r"'res2net50d' have no argument 'scael'; allowed: .*did you mean 'scale'"):
        create_model("res2net50d", block_args={"scael": 8})
    with pytest.raises(ModelError, match="the blocks of 'res2netplus50' take none"):
        create_model("res2netplus50", block_args={"scale": 8})
    with pytest.raises(ModelError, match="must be a mapping"):
        create_model("res2net50d", block_args=8)


def test_block_args_keep_the_architectures_own() -> None:
    """timm would silently build scale 4 here."""
    block = small("res2net50_26w_8s", stem_width=64, block_args={"attn_layer": "se"}).layer1[0]
    assert block.scale == 8
    assert type(block.se).__name__ == "SEModule"
    assert small(block_args={"scale": 2}).layer1[0].scale == 2


def test_resnest_drops_its_residual_branch() -> None:
    model = create_model("resnest14d", drop_path_rate=0.5, channels=(8, 8, 8, 8), stem_width=8)
    assert isinstance(model.layer1[0], SplitAttentionBlock)


# -- published weights -------------------------------------------------------------------------------------------------


def test_weights_info_shows_source_licence_and_preprocessing() -> None:
    info = weights_info("res2net50d")
    assert info is not None
    assert (info.name, info.tag, info.source) == ("res2net50d", "in1k", "timm/res2net50d.in1k")
    assert info.licence == "not stated"
    assert info.page == "https://huggingface.co/timm/res2net50d.in1k"
    assert info.preprocessing.mean == (0.485, 0.456, 0.406)
    assert info.preprocessing.interpolation == "bilinear"
    resnest = weights_info("resnest50d.in1k")
    assert resnest is not None
    assert resnest.licence == "apache-2.0"
    assert weights_info("res2netplus50") is None
    assert weights_info("res2net50d.nosuchtag") is None
    assert weights_info("no_such_model") is None


@pytest.mark.usefixtures("offline")
def test_no_network_fails_at_once_with_one_sentence(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError) as caught:
        create_model("res2net50d", pretrained=True, num_classes=10)
    assert time.monotonic() - start < 5
    assert str(caught.value) == (
        "model.pretrained: no network to fetch the weights of 'res2net50d' (timm/res2net50d.in1k, licence not stated): "
        "give a local file with model.pretrained=path/to/file.safetensors, or model.pretrained=false"
    )
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_weights_behind_an_address(monkeypatch: pytest.MonkeyPatch, offline: None, tmp_path: Path) -> None:
    """Some of timm's weights are on no hub; torch keeps their files."""
    cfg = PretrainedCfg(url="https://example.org/net-01234567.pth", architecture="res2net50d", license="mit")
    monkeypatch.setattr("r2kit.backbones.published.get_pretrained_cfg", lambda name: cfg)
    with pytest.raises(
        ModelError, match=r"no network to fetch .*'res2net50d' \(https://example.org/net-01234567.pth, mit"
    ):
        create_model("res2net50d", pretrained=True)
    info = weights_info("res2net50d")
    assert info is not None
    (tmp_path / "net-01234567.pth").touch()
    assert locate(info, cache_dir=tmp_path) == tmp_path / "net-01234567.pth"


def test_offline_by_wish(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("r2kit.backbones.published._answers", lambda url: pytest.fail("asked the network"))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids to fetch the weights of 'res2net50d'"):
        create_model("res2net50d", pretrained=True)


def test_a_silent_network_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    """Name resolution has no timeout of its own."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    monkeypatch.setattr("r2kit.backbones.published._PROBE_SECONDS", 0.2)
    monkeypatch.setattr("r2kit.backbones.published._answers.__defaults__", (0.2,))
    start = time.monotonic()
    with pytest.raises(ModelError, match="no network"):
        create_model("res2net50d", pretrained=True)
    assert time.monotonic() - start < 1.9


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("res2netplus50", "'res2netplus50d' can start from the weights of 'res2net50d' instead"),
        ("res2netplus50d", "those of 'res2net50d' convert into it"),
        ("scalenet50", "no weights of 'scalenet50' have been published: give a local file"),
    ],
)
def test_unpublished_weights_say_what_exists(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        create_model(name, pretrained=True)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A file as the hub caches it, of a small `res2net50d` with 1000 classes."""
    torch.manual_seed(0)
    model = small()
    file = tmp_path_factory.mktemp("hub") / "model.safetensors"
    save_weights(model, file)
    return file, model


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("features_only", [False, True])
def test_cached_weights_need_no_network(
    cached: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch, features_only: bool
) -> None:
    file, original = cached
    monkeypatch.setattr("r2kit.backbones.published.try_to_load_from_cache", lambda *_, **__: str(file))
    model = small(pretrained=True, num_classes=4, in_chans=5, in_chans_rule="zero", features_only=features_only)
    report = model.load_report
    assert isinstance(report, LoadReport)
    assert report.source == "timm/res2net50d.in1k"
    assert report.licence == "not stated"
    assert report.preprocessing.origin == "published"
    assert "RGB kernels on the first 3 bands, the other 2 bands zero" in report.in_chans
    weight = model.state_dict()["conv1.0.weight"]
    assert torch.equal(weight[:, :3], original.conv1[0].weight)
    assert not weight[:, 3:].any()
    assert torch.equal(model.state_dict()["layer4.0.conv3.weight"], original.layer4[0].conv3.weight)


# -- local files -------------------------------------------------------------------------------------------------------


def test_local_file_sets_what_timm_reads(tmp_path: Path) -> None:
    model = small(num_classes=3)
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    save_weights(model, tmp_path / "m.safetensors", {"preprocess": preprocess})
    loaded = small(num_classes=3, pretrained=tmp_path / "m.safetensors")
    config = timm.data.resolve_model_data_config(loaded)
    assert (config["mean"], config["std"], config["interpolation"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
    assert torch.equal(loaded.fc.weight, model.fc.weight)


def test_features_take_a_local_file(tmp_path: Path) -> None:
    model = small().eval()
    save_weights(model, tmp_path / "m.safetensors")
    features = small(pretrained=str(tmp_path / "m.safetensors"), features_only=True, out_indices=(2,)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(features(x)[0], model.forward_intermediates(x, indices=[2], intermediates_only=True)[0])
