"""Segmentation networks: a decoder of segmentation-models-pytorch over any backbone of r2kit or timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from r2kit.backbones import create_model
from r2kit.backbones.create import map_indices
from r2kit.backbones.weights import LoadReport
from r2kit.errors import ModelError, require
from r2kit.recipe import ModelSpec, SegmentationSpec

if TYPE_CHECKING:
    from r2kit.backbones.weights import InChansRule

_DECODERS = {
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "manet": "MAnet",
    "linknet": "Linknet",
    "fpn": "FPN",
    "pspnet": "PSPNet",
    "deeplabv3": "DeepLabV3",
    "deeplabv3plus": "DeepLabV3Plus",
    "pan": "PAN",
    "upernet": "UPerNet",
}
_DILATED = {"deeplabv3": 8, "deeplabv3plus": 16, "pan": 16}  # the output stride of each by default


class Segmenter(nn.Module):
    """A backbone and a decoder: the classes of every pixel from an image of any size.

    Args:
        network: A model of segmentation-models-pytorch.
        stride: Its encoder needs sides that are a multiple of this; others are filled up with zeros, which are the
            mean colour, and cut back.
        load_report: What loading the backbone's weights did; None for random weights.
    """

    def __init__(self, network: nn.Module, stride: int, load_report: LoadReport | None = None) -> None:
        super().__init__()
        self.network = network
        self.stride = stride
        self.load_report = load_report

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits (B, K, H, W) of images (B, C, H, W)."""
        height, width = image.shape[-2:]
        down, right = -height % self.stride, -width % self.stride
        if down or right:
            image = F.pad(image, (0, right, 0, down))
        logits: Tensor = self.network(image)
        return logits[..., :height, :width]

    @property
    def backbone(self) -> nn.Module:
        """The part whose weights another task can start from."""
        backbone: nn.Module = self.network.encoder.model  # type: ignore[union-attr,assignment]
        return backbone

    def get_classifier(self) -> nn.Module:
        """Return what is not the backbone: decoder and head."""
        return nn.ModuleList([self.network.decoder, self.network.segmentation_head])  # type: ignore[list-item]


def build_segmenter(
    spec: ModelSpec,
    task: SegmentationSpec,
    *,
    num_classes: int,
    in_chans: int,
    rgb_bands: Sequence[int] | None = None,
) -> Segmenter:
    """Build the network that a recipe of a segmentation names, with its backbone's starting weights.

    Args:
        spec: The recipe's `model` section.
        task: The recipe's `task` section.
        num_classes: K.
        in_chans: Bands of the image.
        rgb_bands: Which of them are red, green and blue, for weights made for colour images.

    Raises:
        MissingExtraError: If segmentation-models-pytorch is not installed.
        ModelError: If the backbone cannot be had, or has no maps that this decoder can use.
    """
    require("segmentation_models_pytorch", "segmentation-models-pytorch", "seg", "task.kind=segmentation")
    import segmentation_models_pytorch as smp

    kind = getattr(smp, _DECODERS[task.decoder])
    stride = task.output_stride or _DILATED.get(task.decoder, 32)
    options: dict[str, Any] = {} if stride == 32 else {"encoder_output_stride": stride}
    depth = 3 if task.decoder == "pspnet" else 5
    backbone = build_backbone(
        spec, depth=depth, output_stride=stride, in_chans=in_chans, rgb_bands=rgb_bands, needs=task.decoder
    )
    network = kind(
        f"tu-{spec.name}",
        encoder_weights=None,
        in_channels=in_chans,
        classes=num_classes,
        encoder_depth=depth,
        **options,
    )
    if network.encoder.model.feature_info.channels() != backbone.feature_info.channels():  # type: ignore[operator,union-attr]
        raise ModelError(f"task.decoder={task.decoder}: '{spec.name}' gives other maps with its weights than without")
    # The decoder is built for the maps of the name; ours of the same name has its weights and all other options.
    network.encoder.model = backbone
    return Segmenter(network, max(stride, 2**depth), backbone.load_report)  # type: ignore[arg-type]


def build_backbone(
    spec: ModelSpec,
    *,
    depth: int,
    output_stride: int,
    in_chans: int,
    rgb_bands: Sequence[int] | None,
    needs: str,
) -> nn.Module:
    """Build a backbone that gives its maps at the strides 2, 4, ... 2**depth, with its starting weights.

    Args:
        spec: The recipe's `model` section.
        depth: Number of maps.
        output_stride: Image size over the size of the last map, kept small by dilation.
        in_chans: Bands of the image.
        rgb_bands: Which of them are red, green and blue.
        needs: What needs the maps, for messages.

    Raises:
        ModelError: If the backbone cannot be had, or has no such maps.
    """
    rule: InChansRule = spec.in_chans_rule
    options: dict[str, Any] = {"drop_path_rate": spec.drop_path_rate, **spec.options}
    if output_stride != 32 and depth == 5:
        options["output_stride"] = output_stride
    indices = map_indices(spec.name, [2 ** (i + 1) for i in range(depth)], needs=needs)
    return create_model(
        spec.name,
        pretrained=spec.pretrained,
        in_chans=in_chans,
        in_chans_rule=rule,
        rgb_bands=rgb_bands,
        features_only=True,
        out_indices=indices,
        **options,
    )
