"""Weight files: formats, strictness, adaptation, and what the report says."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from r2kit.backbones import create_model
from r2kit.backbones._fit import drop_dead_projections, fitting_variant, without_memory
from r2kit.backbones.weights import adapt_first_conv, load_state, load_weights, save_weights
from r2kit.errors import ModelError

SMALL: dict[str, Any] = {"layers": (1, 2, 1, 1), "channels": (8, 16, 32, 64)}


@pytest.fixture(autouse=True)
def few_variants(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Compare misfitting files with a few variants only; the slow test compares with all."""
    if "slow" not in request.keywords:
        monkeypatch.setattr("r2kit.backbones._fit._family", lambda: ("resnet50", "res2net50_26w_4s", "res2net50d"))


def v1b(**options: Any) -> nn.Module:
    return create_model("res2net50d", **{**SMALL, "stem_width": 8, "num_classes": 5, **options})


def plus(name: str = "res2netplus50", **options: Any) -> nn.Module:
    return create_model(name, **{**SMALL, "num_classes": 5, **options})


def other(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give a model other weights, as another start would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def same(a: nn.Module, b: nn.Module, *, apart: tuple[str, ...] = ()) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(t, theirs[n]) for n, t in a.state_dict().items() if not n.startswith(apart or ("\0",)))


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrap", "kind"),
    [
        ("m.safetensors", None, "safetensors"),
        ("m.pth", lambda s: s, "state dict"),
        (
            "m.pth.tar",
            lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}},
            "its 'state_dict'",
        ),
        ("m.pt", lambda s: {"model": s, "opt": {"lr": 0.1}}, "its 'model'"),  # fastai's Learner.save
        ("m.bin", lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, "state dict"),  # a compiled network
        (
            "last.ckpt",
            lambda s: {"pytorch-lightning_version": "2.6.6", "state_dict": {f"model.{k}": v for k, v in s.items()}},
            "Lightning checkpoint",
        ),
    ],
)
def test_formats(tmp_path: Path, name: str, wrap: Any, kind: str) -> None:
    trained, model = other(v1b()), v1b()
    file = tmp_path / name
    if wrap is None:
        safetensors.torch.save_file(trained.state_dict(), file)
    else:
        torch.save(wrap(trained.state_dict()), file)
    report = load_weights(model, file)
    assert same(model, trained)
    assert kind in report.kind
    assert report.classifier == "kept (5 classes)"
    assert report.tensors == len(trained.state_dict())
    assert (report.left_out, report.missing) == ((), ())


def test_old_files_that_do_not_count_batches(tmp_path: Path) -> None:
    trained, model = other(v1b()), v1b()
    state = {k: v for k, v in trained.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "old.pth")
    assert torch.equal(model.layer1[0].conv3.weight, trained.layer1[0].conv3.weight)


def test_save_and_load_carry_metadata(tmp_path: Path) -> None:
    trained, model = other(v1b()), v1b()
    metadata = {"classes": ["a", "b"], "preprocess": {"mean": [0.5] * 3, "std": [0.2] * 3}, "licence": "mit"}
    save_weights(nn.DataParallel(trained), tmp_path / "m.safetensors", metadata)
    report = load_weights(model, tmp_path / "m.safetensors")
    assert same(model, trained)
    assert report.metadata == {"architecture": "res2net50d", **metadata}
    assert report.kind == "r2kit weights"
    assert report.licence == "mit"
    assert report.preprocessing is not None
    assert report.preprocessing.mean == (0.5, 0.5, 0.5)
    assert report.preprocessing.origin == "file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]  # nothing half-written beside it
    text = "\n".join(report.lines())
    assert "licence: mit" in text
    assert "mean 0.5, 0.5, 0.5; std 0.2, 0.2, 0.2; bilinear (from the file)" in text


def test_save_refuses_what_is_not_plain(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="metadata must be plain values"):
        save_weights(v1b(), tmp_path / "m.safetensors", {"path": tmp_path})
    with pytest.raises(ModelError, match="cannot be written"):
        save_weights(v1b(), tmp_path / "nowhere" / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_folders(tmp_path: Path) -> None:
    trained, model = other(v1b()), v1b()
    save_weights(trained, tmp_path / "model.safetensors")
    (tmp_path / "preprocess.json").write_text(json.dumps({"mean": [1, 2, 3], "std": [4, 5, 6]}))
    report = load_weights(model, tmp_path)  # the folder of a run
    assert same(model, trained)
    assert report.preprocessing is not None
    assert report.preprocessing.mean == (1.0, 2.0, 3.0)


def test_a_folder_without_weights_points_at_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model.safetensors: give the folder of a run"):
        load_weights(v1b(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ModelError, match=r"unfinished run\?\): give a checkpoint, .*last.ckpt"):
        load_weights(v1b(), tmp_path)


def test_a_backbone_inside_a_larger_model(tmp_path: Path) -> None:
    """What is around the backbone is left out, and said so."""
    trained, model = other(v1b()), v1b()
    state = {f"model.encoder.{k}": v for k, v in trained.state_dict().items()}
    torch.save(
        {"state_dict": {**state, "model.decoder.w": torch.ones(2), "loss.weight": torch.ones(3)}}, tmp_path / "d.ckpt"
    )
    report = load_weights(model, tmp_path / "d.ckpt")
    assert same(model, trained)
    assert report.left_out == ("loss.weight", "model.decoder.w")
    assert "2 tensors outside the backbone are left out (loss, model)" in report.notes


# -- files that cannot be trusted or read ------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_files_that_hold_code_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": _Bomb()}, tmp_path / "code.ckpt")
    torch.save(v1b(), tmp_path / "whole_model.pth")
    for name in ("code.ckpt", "whole_model.pth"):
        with pytest.raises(ModelError, match="opening it would run code from the file: save its state dict alone"):
            load_weights(v1b(), tmp_path / name)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ModelError, match="damaged, or a pickle of something else than tensors, which is never opened"):
        load_weights(v1b(), tmp_path / "plain.pkl")


def test_damaged_files(tmp_path: Path) -> None:
    model = v1b()
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    save_weights(model, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        for size, words in ((len(content) // 2, "damaged or incomplete"), (0, "is empty")):
            cut = tmp_path / f"cut{Path(name).suffix}"
            cut.write_bytes(content[:size])
            with pytest.raises(ModelError, match=words):
                load_weights(model, cut)
    (tmp_path / "noise.pth").write_bytes(b"<html>404 not found</html>" * 20)
    with pytest.raises(ModelError, match=r"noise.pth: damaged, or a pickle of something else"):
        load_weights(model, tmp_path / "noise.pth")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    model = v1b()
    with pytest.raises(ModelError, match="nor its folder"):
        load_weights(model, tmp_path / "nowhere" / "m.pth")
    (tmp_path / "model_best.pth").touch()
    with pytest.raises(ModelError, match=r"no such weight file; did you mean 'model_best.pth'\?"):
        load_weights(model, tmp_path / "model_bset.pth")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"not a weight file by its name; known endings: .*safetensors"):
        load_weights(model, tmp_path / "notes.txt")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "empty.pth")
    with pytest.raises(ModelError, match="holds no state dict; it has: epoch, lr"):
        load_weights(model, tmp_path / "empty.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="holds list, not a state dict"):
        load_weights(model, tmp_path / "list.pth")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    trained = v1b()
    trained.layer1[0].bn1.bias.data[0] = float("nan")
    save_weights(trained, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors hold values that are not finite \(layer1.0.bn1.bias\)"):
        load_weights(v1b(), tmp_path / "m.safetensors")


# -- strictness --------------------------------------------------------------------------------------------------------


def test_a_mismatch_names_tensors_and_the_variant_that_fits() -> None:
    """v1 weights for v1b is the mistake that people make; shapes alone decide, so no memory is needed."""
    model = without_memory("res2net50d")
    state = without_memory("res2net50_26w_4s").state_dict()
    with pytest.raises(ModelError) as caught:
        load_state(model, state, "file.pth", "state dict")
    words = str(caught.value)
    assert words.startswith("file.pth: does not fit 'res2net50d': ")
    assert "(conv1.0.weight, conv1.1.weight, conv1.1.bias, ...)" in words
    assert "21 do not belong there (conv1.weight, " in words
    assert "layer2.0.downsample.1.weight is 512 in the file and 512x256x1x1 in the model" in words
    assert words.endswith("the file fits 'res2net50_26w_4s'")
    assert "\n" not in words


def test_shapes_are_told(tmp_path: Path) -> None:
    save_weights(v1b(base_width=20), tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=r"layer1.0.conv1.weight is 8x16x1x1 in the file and 12x16x1x1"):
        load_weights(v1b(), tmp_path / "m.safetensors")


def test_the_variant_is_found_for_other_bands_and_classes() -> None:
    with torch.device("meta"):
        model = timm.create_model("res2net50_26w_4s", in_chans=13, num_classes=3)
    assert fitting_variant(model.state_dict(), like="res2net50d") == "res2net50_26w_4s"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["res2net101d", "res2netplus101", "resnest50d_4s2x40d", "dla60_res2net", "resnet50"])
def test_each_variant_is_recognised(name: str) -> None:
    assert fitting_variant(without_memory(name).state_dict(), like="res2net50d") == name


def test_an_unknown_network_fits_nothing() -> None:
    assert fitting_variant({"a.weight": torch.ones(1)}, like="res2net50d") is None


def test_equal_shapes_of_another_network_are_not_taken(tmp_path: Path) -> None:
    """`res2netplus50` and the published code's network have the same tensors and compute different things."""
    save_weights(plus("res2netplus50"), tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="holds weights of 'res2netplus50', which computes something else than"):
        load_weights(plus("res2netplus50_res2fg"), tmp_path / "m.safetensors")


def test_not_strict_loads_what_fits_and_reports_the_rest(tmp_path: Path) -> None:
    trained, model = other(v1b(base_width=20)), v1b()
    save_weights(trained, tmp_path / "m.safetensors")
    report = load_weights(model, tmp_path / "m.safetensors", strict=False)
    assert torch.equal(model.fc.weight, trained.fc.weight)
    assert "layer1.0.conv1.weight" in report.left_out
    assert "layer1.0.conv1.weight" in report.missing
    with pytest.raises(ModelError, match="does not fit"):
        load_state(model, {"x": torch.ones(1)}, "m", "state dict", strict=False)


# -- the classifier ----------------------------------------------------------------------------------------------------


def test_another_class_count_leaves_the_classifier(tmp_path: Path) -> None:
    trained, model = other(v1b(num_classes=9)), v1b()
    before = model.fc.weight.clone()
    save_weights(trained, tmp_path / "m.safetensors")
    report = load_weights(model, tmp_path / "m.safetensors")
    assert same(model, trained, apart=("fc.",))
    assert torch.equal(model.fc.weight, before)
    assert report.classifier == "as initialised: 9 classes in the file, 5 in the model"
    assert report.left_out == report.missing == ("fc.bias", "fc.weight")


def test_no_classifier_on_one_side(tmp_path: Path) -> None:
    trained = other(v1b())
    save_weights(trained, tmp_path / "m.safetensors")
    headless = v1b(num_classes=0)
    assert "the model has none" in load_weights(headless, tmp_path / "m.safetensors").classifier
    assert same(headless, trained)
    save_weights(headless, tmp_path / "h.safetensors")
    assert load_weights(v1b(), tmp_path / "h.safetensors").classifier == "none in the file: as initialised"


def test_another_width_of_the_classifier_is_a_mismatch(tmp_path: Path) -> None:
    """Only the number of classes may differ."""
    state = {**v1b().state_dict(), "fc.weight": torch.ones(7, 99)}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ModelError, match=r"fc.weight is 7x99 in the file and 5x256"):
        load_weights(v1b(), tmp_path / "m.pth")


# -- other numbers of bands --------------------------------------------------------------------------------------------


def test_rules_for_more_bands() -> None:
    weight = torch.arange(1.0, 4.0).reshape(1, 3, 1, 1).expand(2, 3, 3, 3)
    fresh = torch.full((2, 5, 3, 3), 9.0)

    def bands(rule: str, rgb: tuple[int, ...] | None = None) -> tuple[list[float], str]:
        out, text = adapt_first_conv(weight, fresh, rule, rgb)  # type: ignore[arg-type]
        return [round(v, 4) for v in out[0, :, 0, 0].tolist()], text

    assert bands("repeat") == ([0.6, 1.2, 1.8, 0.6, 1.2], "RGB kernels repeated in turn for 5 bands, scaled by 3/5")
    assert bands("mean") == ([1.2] * 5, "RGB kernels averaged, repeated x5, scaled by 3/5")
    assert bands("zero") == ([1, 2, 3, 0, 0], "RGB kernels on the first 3 bands, the other 2 bands zero")
    assert bands("random")[0] == [1, 2, 3, 9, 9]
    assert "randomly initialised" in bands("random")[1]
    assert bands("zero", (3, 2, 1)) == ([0, 3, 2, 1, 0], "RGB kernels on bands 3, 2, 1, the other 2 bands zero")
    assert bands("repeat", (3, 2, 1))[0] == [0.6, 1.8, 1.2, 0.6, 1.2]
    with pytest.raises(ModelError, match="must name 3 different bands between 0 and 4"):
        bands("zero", (1, 1, 2))


@pytest.mark.parametrize("rule", ["repeat", "mean", "zero", "random"])
def test_one_band_gets_the_sum(rule: str) -> None:
    weight = torch.randn(4, 3, 3, 3)
    out, text = adapt_first_conv(weight, torch.zeros(4, 1, 3, 3), rule)  # type: ignore[arg-type]
    torch.testing.assert_close(out, weight.sum(1, keepdim=True))
    assert "summed" in text


@pytest.mark.parametrize("bands", [2, 4, 13])
def test_repeat_is_timms_rule(bands: int) -> None:
    weight = torch.randn(4, 3, 3, 3)
    out, _ = adapt_first_conv(weight, torch.zeros(4, bands, 3, 3), "repeat")
    torch.testing.assert_close(out, timm.models.adapt_input_conv(bands, weight))


@pytest.mark.parametrize("rule", ["repeat", "mean"])
def test_equal_bands_give_the_same_response(rule: str) -> None:
    """A grey image looks the same to the adapted network, whatever the number of bands."""
    weight, grey = torch.randn(4, 3, 3, 3), torch.randn(1, 1, 8, 8)
    out, _ = adapt_first_conv(weight, torch.zeros(4, 12, 3, 3), rule)  # type: ignore[arg-type]
    want = torch.nn.functional.conv2d(grey.expand(1, 3, 8, 8), weight)
    torch.testing.assert_close(torch.nn.functional.conv2d(grey.expand(1, 12, 8, 8), out), want, rtol=1e-4, atol=1e-5)


def test_a_file_for_other_bands(tmp_path: Path) -> None:
    trained = other(v1b())
    save_weights(trained, tmp_path / "m.safetensors")
    model = v1b(in_chans=13)
    report = load_weights(model, tmp_path / "m.safetensors", in_chans_rule="mean")
    assert report.in_chans == "RGB kernels averaged, repeated x13, scaled by 3/13"
    assert same(model, trained, apart=("conv1.0.",))
    back = v1b()
    save_weights(model, tmp_path / "13.safetensors")
    assert "kernels of 13 bands" in load_weights(back, tmp_path / "13.safetensors").in_chans
    with pytest.raises(ModelError, match="in_chans_rule: got 'median'"):
        load_weights(model, tmp_path / "m.safetensors", in_chans_rule="median")  # type: ignore[arg-type]


# -- files of the authors ----------------------------------------------------------------------------------------------


def published_plus(state: dict[str, torch.Tensor], bn: str = "2") -> dict[str, torch.Tensor]:
    """Name the stem as res2fg.py does: three modules conv1, conv2, conv3 of convolution (0), Mish (1), BN (2)."""
    names = {"conv1.0": "conv1.0", "conv1.2": f"conv1.{bn}", "conv1.3": "conv2.0", "conv1.5": f"conv2.{bn}"}
    names |= {"conv1.6": "conv3.0", "bn1": f"conv3.{bn}"}
    out = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        out[f"{names.get(module, module)}.{leaf}"] = tensor
    return out


def test_files_of_the_published_res2netplus_code(tmp_path: Path) -> None:
    trained, model = other(plus("res2netplus50_res2fg")), plus("res2netplus50_res2fg")
    state = published_plus(trained.state_dict())
    assert {"conv1.2.running_mean", "conv2.0.weight", "conv3.2.weight"} <= state.keys()
    torch.save({"model": state, "opt": {}}, tmp_path / "res2fg.pth")
    load_weights(model, tmp_path / "res2fg.pth")
    assert same(model, trained)
    with pytest.raises(ModelError, match="does not compute 'res2netplus50'; the file fits 'res2netplus50_res2fg'"):
        load_weights(plus("res2netplus50"), tmp_path / "res2fg.pth")
    torch.save(published_plus(trained.state_dict(), bn="1"), tmp_path / "first.pth")
    with pytest.raises(ModelError, match=r"first version of res2fg.py, which normalises before Mish"):
        load_weights(model, tmp_path / "first.pth")


def test_dead_projections_of_the_authors_dla_files() -> None:
    """Sizes as counted in the authors' code: 297,472 parameters are never used."""
    model = without_memory("dla60_res2net")
    state = dict(model.state_dict())
    # One in level3 (two levels) and two in level4 (three levels: its own and its first half's).
    dead = {"level3": (128, 256), "level4": (256, 512), "level4.tree1": (256, 512)}
    extra = {}
    for tree, (chs_in, chs_out) in dead.items():
        extra[f"{tree}.project.0.weight"] = torch.zeros(chs_out, chs_in, 1, 1, device="meta")
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            extra[f"{tree}.project.1.{leaf}"] = torch.zeros(chs_out, device="meta")
    used = sum(t.numel() for k, t in extra.items() if not k.rpartition(".")[2].startswith("running"))
    kept, dropped = drop_dead_projections({**state, **extra}, model)
    assert dropped.keys() == extra.keys()
    assert kept.keys() == state.keys()
    assert used == 297_472


def test_rough_dla_file_end_to_end(tmp_path: Path) -> None:
    tiny = {"levels": (1, 1, 1, 2, 1, 1), "channels": (8, 8, 32, 32, 32, 64), "num_classes": 5}
    trained, model = other(create_model("dla60_res2net", **tiny)), create_model("dla60_res2net", **tiny)
    state = {**trained.state_dict(), "level3.project.0.weight": torch.ones(32, 32, 1, 1)}
    torch.save(state, tmp_path / "dla.pth")
    report = load_weights(model, tmp_path / "dla.pth")
    assert same(model, trained)
    assert report.left_out == ("level3.project.0.weight",)
    assert "projections that the authors' code computes but never uses" in report.notes[0]
