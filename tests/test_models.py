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
