import pytest
import torch

import r2kit
from r2kit.errors import ModelError, RunError
from r2kit.models import build_model
from r2kit.recipe import ModelSpec
from r2kit.run import Run


def test_red_green_and_blue_are_found_by_name(tmp_path):
    from r2kit.backbones.weights import save_weights

    torch.manual_seed(0)
    source = r2kit.create_model("test_resnet", num_classes=2)
    save_weights(source, tmp_path / "rgb.safetensors")
    spec = ModelSpec(name="test_resnet", pretrained=str(tmp_path / "rgb.safetensors"), in_chans_rule="zero")
    model = build_model(spec, num_classes=2, bands=("nir", "blue", "green", "red"))
    first, wanted = (next(net.parameters()) for net in (model, source))
    assert first.shape[1] == 4
    ratio = first[:, 3] / wanted[:, 0]
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4)
    assert not first[:, 0].any()


def test_three_bands_in_another_order_see_what_colour_images_see(tmp_path):
    from r2kit.backbones.weights import save_weights
    from r2kit.data.preprocess import Preprocess
    from r2kit.models import fit_preprocess

    torch.manual_seed(0)
    source = r2kit.create_model("test_resnet", num_classes=2).eval()
    known = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    save_weights(source, tmp_path / "rgb.safetensors", {"preprocess": known})
    spec = ModelSpec(name="test_resnet", pretrained=str(tmp_path / "rgb.safetensors"), in_chans_rule="mean")
    image = torch.rand(1, 3, 64, 64)
    for names in (("blue", "green", "red"), ("green", "red", "blue"), ("Red", "green", "blue")):
        model = build_model(spec, num_classes=2, bands=names).eval()
        order = [("red", "green", "blue").index(name.lower()) for name in names]
        with torch.inference_mode():
            torch.testing.assert_close(model(image[:, order]), source(image), rtol=1e-4, atol=1e-5)
        ours = Preprocess(names, (0.5,) * 3, (0.2,) * 3, 255.0, (64, 64), "squash", "bilinear", ("a", "b"))
        fitted, _ = fit_preprocess(ours, model.load_report)
        assert fitted.mean == tuple(known["mean"][place] for place in order)
        assert fitted.std == tuple(known["std"][place] for place in order)
        # The weights of a run go on with its own bands as they were.
        save_weights(model, tmp_path / "run.safetensors", {"preprocess": fitted.to_dict()})
        on = build_model(
            ModelSpec(name="test_resnet", pretrained=str(tmp_path / "run.safetensors")), num_classes=2, bands=names
        )
        assert torch.equal(next(on.parameters()), next(model.parameters()))
        assert fit_preprocess(ours, on.load_report)[0].mean == fitted.mean
    false = ("nir", "red", "green")
    save_weights(source, tmp_path / "false.safetensors", {"preprocess": {**known, "bands": list(false)}})
    spec = ModelSpec(name="test_resnet", pretrained=str(tmp_path / "false.safetensors"))
    kept = build_model(spec, num_classes=2, bands=("blue", "green", "red"))
    assert torch.equal(next(kept.parameters()), next(source.parameters()))  # nobody knows where near infrared belongs


def test_a_recipe_without_images_cannot_warm_start():
    spec = ModelSpec(name="res2netplus50d", warm_start=True, pretrained=True)
    with pytest.raises(ValueError, match="measures statistics on training images"):
        build_model(spec, num_classes=2, bands=("red", "green", "blue"))


def test_weights_that_do_not_fit_the_run_are_one_line(finished_run, tmp_path):
    import shutil

    folder = shutil.copytree(finished_run.path, tmp_path / "run")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("name: test_resnet", "name: resnet18"))
    with pytest.raises(RunError) as caught:
        Run.open(folder).model()
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_names_are_refused():
    with pytest.raises(ModelError, match="res2netplus50"):
        build_model(ModelSpec(name="res2netplus5"), num_classes=2, bands=("red",))
