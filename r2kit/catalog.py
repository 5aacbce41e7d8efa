"""The multi-scale family as data: what each network is called, how large it is, and what was published of it.

One row per network, whoever implements it. This module imports no torch, so that listing the family and suggesting a
misspelt name are quick; a test builds every network and compares it with its row.

Sizes are exact. `macs` are the multiply-adds of the convolutions and linear layers for one image of `input_size`;
papers round them, and some papers count differently. `top1` is what the source states for its own weights and protocol,
not something measured here.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

__all__ = ["CATALOG", "CatalogEntry", "family"]

_PAPER = "Res2Net paper, arXiv:1904.01169"
_RES2NET = "github.com/Res2Net/Res2Net-PretrainedModels, README"
_RESNEST = "github.com/zhanghang1989/ResNeSt, README"
_ABLATION = "github.com/zhanghang1989/ResNeSt, ablation.md"
_GLUON = "gluon-cv model zoo, ResNeSt table"
_SCALENET = "github.com/Eli-YiLi/ScaleNet, README (120 epochs, cosine)"
_BIGLITTLE = "github.com/IBM/BigLittleNet, README"
_CIFAR_SE = "SE reduction 16 unverified: no one reduction gives the published sizes"


@dataclass(frozen=True)
class CatalogEntry:
    """One network of the family.

    Args:
        name: As registered with timm.
        family: Name of the row of relatives that it belongs to.
        owner: Who implements it.
        params: Parameters, with the classifier of `num_classes`.
        macs: Multiply-adds of convolutions and linear layers at `input_size`.
        input_size: (C, H, W) that the figures hold for.
        num_classes: Classes that the figures hold for.
        top1: Published top-1 accuracy in percent, or None where none was published.
        dataset: Data set of `top1`.
        source: Where `top1` is stated; empty without one.
        weights: Where published weights are kept, as a Hugging Face repository, or None.
        licence: Licence of these weights as their keeper states it; ``unknown`` where he states none.
        notes: What is inferred, unverified or easily misread.
    """

    name: str
    family: str
    owner: Literal["timm", "r2kit"]
    params: int
    macs: int
    input_size: tuple[int, int, int] = (3, 224, 224)
    num_classes: int = 1000
    top1: float | None = None
    dataset: str = "ImageNet-1k"
    source: str = ""
    weights: str | None = None
    licence: str | None = None
    notes: str = ""


def family(pattern: str | None = None) -> list[CatalogEntry]:
    """Return the rows whose name or family matches, in the order of the catalog.

    Args:
        pattern: A shell pattern (``res2net50*``) for the whole name, or, without wildcards, a part of the name or of
            the family, in any case. None for all.
    """
    if pattern is None:
        return list(CATALOG)
    low = pattern.lower()
    if any(c in low for c in "*?["):
        return [e for e in CATALOG if fnmatch.fnmatchcase(e.name, low)]
    return [e for e in CATALOG if low in e.name or low in e.family.lower()]


def _timm(name: str, family: str, params: int, macs: int, top1: float, source: str, **rest: object) -> CatalogEntry:
    """Return a row of a network that timm owns, with the weights that timm loads by default."""
    tag = "gluon_in1k" if name in ("resnest14d", "resnest26d") else "in1k"
    licence = "apache-2.0" if family == "ResNeSt" else "unknown"
    fields = {"top1": top1, "source": source, "weights": f"timm/{name}.{tag}", "licence": licence, **rest}
    return CatalogEntry(name, family, "timm", params, macs, **fields)  # type: ignore[arg-type]


def _ours(
    name: str, family: str, params: int, macs: int, top1: float | None = None, source: str = "", notes: str = ""
) -> CatalogEntry:
    """Return a row of a network that r2kit implements; none of them has published weights."""
    return CatalogEntry(name, family, "r2kit", params, macs, top1=top1, source=source, notes=notes)


def _cifar(name: str, params: int, macs: int, top1: float, notes: str = "") -> CatalogEntry:
    """Return a row of a CIFAR network."""
    return CatalogEntry(
        name,
        "CIFAR Res2NeXt-29",
        "r2kit",
        params,
        macs,
        input_size=(3, 32, 32),
        num_classes=100,
        top1=top1,
        dataset="CIFAR-100",
        source=f"{_PAPER}, table 4",
        notes="; ".join(filter(None, ["no official code; first unit inferred from the published sizes", notes])),
    )


_NO_FIGURES = "no accuracy was published"
_NO_IMAGENET = "no ImageNet accuracy was published"
_DEAD = "the authors' own code has 297,472 parameters more, which it never uses"
_BL_INFERRED = "no official code: alpha 2, beta 4 and Res2 units in every branch are inferred"
_SSLD = "the published accuracy is of a distilled network (SSLD)"

CATALOG: tuple[CatalogEntry, ...] = (
    _timm("res2net50_26w_4s", "Res2Net", 25_699_120, 4_255_166_464, 77.99, _RES2NET),
    _timm("res2net50_48w_2s", "Res2Net", 25_287_304, 4_159_832_064, 77.32, _RES2NET),
    _timm("res2net50_14w_8s", "Res2Net", 25_059_816, 4_178_898_944, 78.14, _RES2NET),
    _timm("res2net50_26w_6s", "Res2Net", 37_051_448, 6_295_523_328, 78.58, _RES2NET),
    _timm("res2net50_26w_8s", "Res2Net", 48_403_776, 8_335_880_192, 79.20, _RES2NET),
    _timm("res2net101_26w_4s", "Res2Net", 45_206_688, 8_066_974_464, 79.19, _RES2NET),
    _ours("res2net50_18w_4s", "Res2Net", 18_095_104, 2_898_407_424, 77.08, f"{_PAPER}, table 3"),
    _ours("res2net50_18w_6s", "Res2Net", 25_158_664, 4_180_905_984, notes=_NO_FIGURES),
    _ours("res2net152_26w_4s", "Res2Net", 61_275_248, 11_878_782_464, notes=_NO_FIGURES),
    _timm("res2net50d", "Res2Net v1b", 25_718_352, 4_494_807_040, 80.27, _RES2NET, notes="trained with CutMix"),
    _timm("res2net101d", "Res2Net v1b", 45_225_920, 8_306_615_040, 81.23, _RES2NET),
    _ours("res2net152d", "Res2Net v1b", 61_294_480, 12_118_423_040, notes=_NO_FIGURES),
    _ours("res2net200d", "Res2Net v1b", 76_215_536, 15_706_007_040, 85.13, _RES2NET, _SSLD),
    _timm("res2next50", "Res2NeXt", 24_671_464, 4_172_677_120, 78.24, _RES2NET),
    _ours(
        "seres2net50",
        "SE-Res2Net",
        28_230_112,
        4_257_681_408,
        78.44,
        f"{_PAPER}, table 1",
        "SE reduction 16 unverified",
    ),
    _timm("dla60_res2net", "Res2Net-DLA", 20_848_072, 4_122_681_344, 78.47, _RES2NET, notes=_DEAD),
    _timm("dla60_res2next", "Res2Net-DLA", 17_032_984, 3_458_752_512, 78.45, _RES2NET, notes=_DEAD),
    _ours("blres2net50", "Big-Little", 26_845_561, 2_993_782_592, 78.32, f"{_PAPER}, table 1", _BL_INFERRED),
    _ours("blresnet50", "Big-Little", 26_694_568, 2_856_058_880, 77.59, _BIGLITTLE),
    _ours("blresnet101", "Big-Little", 41_851_560, 3_893_297_152, 78.66, _BIGLITTLE),
    _ours("blresnet152", "Big-Little", 57_359_016, 5_039_718_400, notes=_NO_FIGURES),
    _ours("blresnext50_32x4d", "Big-Little", 26_192_168, 3_027_058_688, 78.38, _BIGLITTLE),
    _ours("blresnext101_32x4d", "Big-Little", 41_512_744, 4_079_149_056, 79.13, _BIGLITTLE),
    _ours(
        "blresnext101_64x4d",
        "Big-Little",
        77_355_816,
        7_142_293_504,
        79.66,
        _BIGLITTLE,
        "the published 7.97 G are those of plain ResNeXt-101 32x4d",
    ),
    _ours("blseresnext50_32x4d", "Big-Little", 28_767_120, 3_029_616_640, 78.56, _BIGLITTLE),
    _ours("blseresnext101_32x4d", "Big-Little", 45_881_952, 4_083_484_672, 78.96, _BIGLITTLE),
    _cifar("cifar_res2next29_6c24w4s", 24_360_932, 3_947_925_504, 83.02),
    _cifar("cifar_res2next29_8c25w4s", 33_905_236, 5_505_175_552, 83.07),
    _cifar("cifar_res2next29_6c24w6s", 36_801_380, 5_974_560_768, 83.21),
    _cifar("cifar_seres2next29_6c24w4s", 24_882_740, 3_948_441_600, 83.32, _CIFAR_SE),
    _cifar("cifar_seres2next29_8c25w4s", 34_427_044, 5_505_691_648, 83.36, _CIFAR_SE),
    _cifar("cifar_seres2next29_6c24w6s", 37_323_188, 5_975_076_864, 83.44, _CIFAR_SE),
    _cifar("cifar_resnext29_8c64w", 34_518_948, 5_387_358_208, 82.10),
    _cifar("cifar_resnext29_16c64w", 68_247_460, 10_688_958_464, 82.69),
    _ours("res2netplus50", "Res2NetPlus", 25_746_064, 4_841_623_552, notes=_NO_IMAGENET),
    _ours("res2netplus101", "Res2NetPlus", 45_253_632, 8_653_431_552, notes=_NO_IMAGENET),
    _ours("res2netplus152", "Res2NetPlus", 61_322_192, 12_465_239_552, notes=_NO_IMAGENET),
    _ours(
        "res2netplus50d",
        "Res2NetPlus",
        25_729_218,
        4_494_807_040,
        notes="on the v1b skeleton; starts from res2net50d's weights by conversion",
    ),
    _ours(
        "res2netplus101d",
        "Res2NetPlus",
        45_249_162,
        8_306_615_040,
        notes="on the v1b skeleton; starts from res2net101d's weights by conversion",
    ),
    _ours("res2nextplus50", "Res2NetPlus", 24_718_408, 4_759_134_208, notes=_NO_IMAGENET),
    _ours(
        "res2netplus50_res2fg",
        "Res2NetPlus",
        25_746_064,
        4_841_623_552,
        notes="as the published code computes it, its aliasing included; weights are not interchangeable",
    ),
    _timm("resnest14d", "ResNeSt", 10_611_688, 2_749_405_184, 75.75, _GLUON),
    _timm("resnest26d", "ResNeSt", 17_069_448, 3_623_391_232, 78.68, _GLUON),
    _timm("resnest50d", "ResNeSt", 27_483_240, 5_371_160_576, 81.03, _RESNEST),
    _timm("resnest101e", "ResNeSt", 48_275_016, 13_321_472_000, 82.83, _RESNEST, input_size=(3, 256, 256)),
    _timm("resnest200e", "ResNeSt", 70_201_544, 35_519_694_848, 83.84, _RESNEST, input_size=(3, 320, 320)),
    _timm("resnest269e", "ResNeSt", 110_929_480, 77_348_702_208, 84.54, _RESNEST, input_size=(3, 416, 416)),
    _timm("resnest50d_4s2x40d", "ResNeSt", 30_417_592, 4_369_060_736, 81.14, _ABLATION),
    _timm("resnest50d_1s4x24d", "ResNeSt", 25_677_000, 4_399_827_456, 80.99, _ABLATION),
    _ours("resnest50d_1s1x64d", "ResNeSt", 26_217_896, 4_329_459_712, 80.33, _ABLATION),
    _ours("resnest50d_2s1x64d", "ResNeSt", 27_483_240, 4_330_711_040, 80.53, _ABLATION),
    _ours("resnest50d_4s1x64d", "ResNeSt", 31_912_712, 4_335_112_192, 80.76, _ABLATION),
    _ours("resnest50d_1s2x40d", "ResNeSt", 25_946_680, 4_364_642_816, 80.59, _ABLATION),
    _ours("resnest50d_2s2x40d", "ResNeSt", 26_943_792, 4_365_622_336, 80.61, _ABLATION),
    _ours("scalenet50_light", "ScaleNet", 23_631_912, 2_861_475_840, 77.20, _SCALENET),
    _ours("scalenet50", "ScaleNet", 31_483_618, 3_818_372_352, 77.98, _SCALENET, "77.80 by the paper's own recipe"),
    _ours("scalenet101", "ScaleNet", 54_792_390, 7_511_097_600, 79.18, _SCALENET),
    _ours("scalenet152", "ScaleNet", 77_220_070, 11_211_951_616, 79.94, _SCALENET),
)
