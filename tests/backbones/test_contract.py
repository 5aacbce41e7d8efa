"""What every backbone owes, whoever implements it: timm's contract, its exact size, and its frozen state-dict keys.

The sweeps over all names look at shapes, connections and counts, on networks of zeros. What needs numbers runs on one
network of each kind, and on all of them when marked slow.
"""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

import r2kit.backbones  # noqa: F401
from r2kit.backbones import count_macs, count_parameters, create_model
from r2kit.catalog import CATALOG, CatalogEntry
from tests.backbones.freeze_keys import fingerprint, frozen

OURS = [pytest.param(e, id=e.name) for e in CATALOG if e.owner == "r2kit"]
# One of each kind, the cheapest there is.
KINDS = [
    "res2net50_18w_4s",
    "res2net50d",
    "seres2net50",
    "cifar_seres2next29_6c24w4s",
    "res2netplus50",
    "res2netplus50d",
    "res2netplus50_res2fg",
    "blres2net50",
    "blseresnext50_32x4d",
    "resnest50d_1s2x40d",
    "scalenet50_light",
    "dla60_res2net",
]
FIXED_STRIDE = {"dla60_res2net", "dla60_res2next"}  # timm's DLA takes no output stride other than 32, and no drop path
FROZEN = frozen()


def is_cifar(name: str) -> bool:
    return name.startswith("cifar")


def size_of(name: str) -> int:
    """A small image that the network can take."""
    return 32 if is_cifar(name) else 64


def images(name: str, in_chans: int = 3, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, in_chans, size_of(name), size_of(name), generator=generator)


def slow_if_deep(entry: CatalogEntry) -> object:
    """The deep networks are their shallow relatives with more units."""
    deep = any(depth in entry.name for depth in ("101", "152", "200", "269"))
    return pytest.param(entry, id=entry.name, marks=pytest.mark.slow if deep else ())


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=5, **options)


def of_zeros(model: nn.Module) -> nn.Module:
    """Give a network of the meta device real tensors, without the time that random ones take."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model


# ---------------------------------------------------------------------------------------------- every name, of zeros


def test_every_name_of_the_family_exists() -> None:
    for entry in CATALOG:
        assert timm.is_model(entry.name), entry.name
        home = timm.model_entrypoint(entry.name).__module__.partition(".")[0]
        assert home == entry.owner, f"{entry.name} belongs to {home}"


def test_every_name_of_ours_is_in_the_catalog() -> None:
    ours = {n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("r2kit.")}
    assert ours == {e.name for e in CATALOG if e.owner == "r2kit"}


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in CATALOG])
def test_size_and_keys(entry: CatalogEntry) -> None:
    name = entry.name
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg

    assert (count_parameters(model), count_macs(model, entry.input_size)) == (entry.params, entry.macs)
    assert (model.num_classes, cfg["input_size"]) == (entry.num_classes, entry.input_size)
    weights, licence = (cfg["hf_hub_id"], cfg["license"]) if entry.owner == "timm" else (None, None)
    assert (weights, licence) == (entry.weights, entry.licence)
    if entry.owner == "r2kit":
        assert fingerprint(model) == FROZEN[name], "state-dict keys or shapes changed"
    keys = set(model.state_dict())
    assert f"{cfg['first_conv']}.weight" in keys
    assert f"{cfg['classifier']}.weight" in keys


@pytest.mark.parametrize("entry", [slow_if_deep(e) for e in CATALOG])
def test_network(entry: CatalogEntry) -> None:
    """Shapes, gradients, groups and head, of one network built once."""
    name = entry.name
    model = of_zeros(timm.create_model(name, device="meta"))
    cfg = model.pretrained_cfg
    side = 16 if is_cifar(name) else 32
    x = torch.zeros(2, 3, side, side)
    logits = model.train()(x)
    assert logits.shape == (2, entry.num_classes)
    logits.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []

    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in model.named_parameters())
        assert f"{cfg['first_conv']}.weight" in groups[0]
        assert f"{cfg['classifier']}.weight" in groups[max(groups)]
        assert len(groups) >= (5 if coarse and not is_cifar(name) else 4)

    with torch.no_grad():
        features = model.eval().forward_features(x)
        reduction = model.feature_info[-1]["reduction"]
        assert features.shape == (2, model.num_features, side // reduction, side // reduction)
        assert tuple(cfg["pool_size"]) == tuple(side // reduction for side in entry.input_size[1:])
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)

        last, maps = model.forward_intermediates(x)
        assert last.shape == features.shape
        assert [tuple(m.shape) for m in maps] == [
            (2, info["num_chs"], side // info["reduction"], side // info["reduction"]) for info in model.feature_info
        ]

        model.reset_classifier(7)
        assert model.num_classes == 7
        assert model.forward_head(features).shape == (2, 7)
        model.reset_classifier(0)
        assert model.forward_head(features).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model.forward_head(features).shape == features.shape


@pytest.mark.parametrize("entry", [slow_if_deep(e) for e in CATALOG])
def test_features_of_thirteen_bands(entry: CatalogEntry) -> None:
    name = entry.name
    model = timm.create_model(name, device="meta", features_only=True, in_chans=13)
    reductions = [1, 1, 2, 4] if is_cifar(name) else [2, 4, 8, 16, 32]
    if name.startswith("dla"):
        reductions = [1, 2, 4, 8, 16, 32][-len(model.feature_info.reduction()) :]
    assert model.feature_info.reduction() == reductions
    with torch.no_grad():
        maps = of_zeros(model).eval()(torch.zeros(1, 13, 32, 32))
    sides = [32 // r for r in reductions]
    assert [(m.shape[1], m.shape[2], m.shape[3]) for m in maps] == [
        (chs, side, side) for chs, side in zip(model.feature_info.channels(), sides, strict=True)
    ]


@pytest.mark.parametrize(("output_stride", "in_chans"), [(8, 3), (16, 1)])
@pytest.mark.parametrize("name", [n for n in KINDS if not is_cifar(n) and n not in FIXED_STRIDE])
def test_output_stride(name: str, output_stride: int, in_chans: int) -> None:
    check_output_stride(name, output_stride, in_chans)


@torch.no_grad()
def check_output_stride(name: str, output_stride: int, in_chans: int) -> None:
    options = {"device": "meta", "output_stride": output_stride, "in_chans": in_chans}
    model = timm.create_model(name, **options)
    if in_chans == 3:
        assert fingerprint(model) == fingerprint(timm.create_model(name, device="meta"))  # weights fit any stride
    side = 64 // output_stride
    x = torch.zeros(1, in_chans, 64, 64)
    assert of_zeros(model).eval().forward_features(x).shape[-2:] == (side, side)
    features = timm.create_model(name, **options, features_only=True, out_indices=(2, 4))
    assert features.feature_info.reduction() == [8, output_stride]
    assert [m.shape[-1] for m in of_zeros(features).eval()(x)] == [8, side]


# -------------------------------------------------------------------------------------- one of each kind, with numbers


def block_of(model: nn.Module, drop: str) -> nn.Module:
    return model.get_submodule(drop.rpartition(".")[0])


@pytest.mark.parametrize("name", [*(n for n in KINDS if n not in FIXED_STRIDE), "resnest14d"])
def test_drop_path_drops_the_residual_branch(name: str) -> None:
    check_drop_path(name)


def check_drop_path(name: str) -> None:
    model = build(name, drop_path_rate=0.5)
    drops = {n: m for n, m in model.named_modules() if isinstance(m, DropPath)}
    rates = [m.drop_prob for m in drops.values()]
    assert max(rates) == pytest.approx(0.5)
    assert min(rates) > 0

    x = images(name)
    with torch.no_grad():
        asked = model.eval()(x)
        for module in drops.values():
            module.drop_prob = 0.0
        assert torch.equal(asked, model(x)), "it acts in evaluation"

    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # some start residual branches at zero, which would hide what is tested
    for module in drops.values():
        module.drop_prob = 1.0
    model(x).square().sum().backward()
    for drop in drops:
        for n, p in block_of(model, drop).named_parameters():
            on_shortcut = n.startswith(("downsample", "shortcut"))
            assert p.grad is None or on_shortcut or p.grad.abs().max() == 0, f"{drop} does not drop {n}"
            assert not on_shortcut or p.grad.abs().max() > 0, f"{drop} drops the shortcut's {n}"
    assert next(model.parameters()).grad.abs().max() > 0


@pytest.mark.parametrize("name", KINDS)
def test_every_gradient_is_a_number_and_moves(name: str) -> None:
    model = build(name).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    nn.functional.cross_entropy(model(images(name)), torch.tensor([0, 1])).backward()
    for n, p in model.named_parameters():
        assert torch.isfinite(p.grad).all(), n
        assert p.grad.abs().max() > 0, n


@pytest.mark.parametrize("name", [n for n in KINDS if n not in FIXED_STRIDE])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = build(name).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = []
    for enable in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images(name)).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for (n, _), plain, checkpointed in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(checkpointed, plain, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", KINDS)
def test_features_only_is_the_same_network(name: str) -> None:
    model = build(name).eval()
    features = of_zeros(timm.create_model(name, features_only=True, device="meta")).eval()
    inner = features.model if isinstance(features, FeatureGetterNet) else features
    rest = inner.load_state_dict(model.state_dict(), strict=False)
    assert rest.missing_keys == []
    assert {k.partition(".")[0] for k in rest.unexpected_keys} <= {"fc"}
    x = images(name)
    with torch.no_grad():
        torch.testing.assert_close(features(x)[-1], model.forward_features(x))


@pytest.mark.parametrize("name", ["res2netplus50", "blres2net50", "scalenet50_light", "seres2net50"])
@pytest.mark.parametrize("size", [96, 225])
def test_takes_other_image_sizes(name: str, size: int) -> None:
    model = of_zeros(timm.create_model(name, device="meta")).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 1000)
        assert model(torch.zeros(1, 3, size, 64)).shape == (1, 1000)


# ---------------------------------------------------------------------------------------- slow: TorchScript, and all


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # timm's users still script
@pytest.mark.parametrize("name", [n for n in KINDS if n not in FIXED_STRIDE])
def test_scripts(name: str) -> None:
    model = build(name, scriptable=True).eval()
    x = images(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("entry", OURS)
def test_numbers_of_all(entry: CatalogEntry) -> None:
    """What timm's own sweep asks with numbers: forward at full size, backward, features."""
    model = timm.create_model(entry.name, num_classes=42)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(torch.randn(1, *entry.input_size))).all()
    logits = model.train()(images(entry.name))
    logits.mean().backward()
    assert torch.isfinite(logits).all()
    assert all(p.grad is not None for p in model.parameters())
    features = timm.create_model(entry.name, features_only=True).eval()
    with torch.no_grad():
        assert all(torch.isfinite(m).all() for m in features(images(entry.name)))
    if not is_cifar(entry.name):
        for output_stride in (8, 16):
            check_output_stride(entry.name, output_stride, 3)
    check_drop_path(entry.name)
