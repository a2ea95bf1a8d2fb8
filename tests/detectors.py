"""torchvision's detectors over a tiny backbone, with seeded weights, and pictures and targets for them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import keypoint_rcnn, mask_rcnn, retinanet, rpn, ssd
from torchvision.ops import MultiScaleRoIAlign

CHANNELS, LEVELS = 32, 3  # group norms want 32 channels


class Pyramid(nn.Module):
    """Maps of 1/4, 1/8 and 1/16 of the picture."""

    out_channels = CHANNELS

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 4, 4)
        self.down = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1) for _ in range(LEVELS - 1))

    def forward(self, pictures):
        maps = [self.stem(pictures)]
        for layer in self.down:
            maps.append(layer(maps[-1].relu()))
        return OrderedDict((str(level), map) for level, map in enumerate(maps))


def _rcnn(kind, **heads):
    anchors = rpn.AnchorGenerator(((8,), (16,), (32,)), ((0.5, 1.0, 2.0),) * LEVELS)
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    options = {"rpn_post_nms_top_n_test": 40, "rpn_post_nms_top_n_train": 40, "box_score_thresh": 0.01}
    options["box_detections_per_img"] = 1000  # no cut between almost equal scores
    return kind(Pyramid(), 4, 64, 96, rpn_anchor_generator=anchors, box_roi_pool=pooler, **options, **heads)


def _mask_rcnn():
    pooler, head = MultiScaleRoIAlign(["0", "1", "2"], 14, 2), mask_rcnn.MaskRCNNHeads(CHANNELS, (256,), 1)
    return _rcnn(detection.MaskRCNN, mask_roi_pool=pooler, mask_head=head)


def _keypoint_rcnn():
    pooler, head = MultiScaleRoIAlign(["0", "1", "2"], 14, 2), keypoint_rcnn.KeypointRCNNHeads(CHANNELS, (512,))
    return _rcnn(detection.KeypointRCNN, keypoint_roi_pool=pooler, keypoint_head=head, num_keypoints=5)


def _retinanet(loss="l1"):
    anchors = rpn.AnchorGenerator(((8,), (16,), (32,)), ((0.5, 1.0, 2.0),) * LEVELS)
    model = retinanet.RetinaNet(Pyramid(), 4, 64, 96, anchor_generator=anchors, score_thresh=0.005)
    model.head.regression_head._loss_type = loss
    return model


def _fcos():
    anchors = rpn.AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * LEVELS)
    return detection.FCOS(Pyramid(), 4, 64, 96, anchor_generator=anchors, score_thresh=0.001)


def _ssd():
    anchors = ssd.DefaultBoxGenerator([[2]] * LEVELS, scales=[0.1, 0.3, 0.6, 0.9], steps=[4, 8, 16])
    return ssd.SSD(Pyramid(), anchors, (64, 64), 4, head=ssd.SSDHead([CHANNELS] * LEVELS, [4] * LEVELS, 4))


DETECTORS = {
    "faster_rcnn": lambda: _rcnn(detection.FasterRCNN),
    "mask_rcnn": _mask_rcnn,
    "keypoint_rcnn": _keypoint_rcnn,
    "retinanet": _retinanet,
    "retinanet_giou": lambda: _retinanet("giou"),
    "fcos": _fcos,
    "ssd": _ssd,
}


def make(name: str, device: str = "cpu") -> nn.Module:
    """The detector in float64 and eval mode; its predictors spread out, so that boxes and scores differ.

    In float64 no two scores are so near that rounding decides which box suppresses the other.
    """
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = DETECTORS[name]()
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                deep = "backbone" not in key
                nn.init.normal_(weight, std=(2.0 if deep else 1.0) / weight[0].numel() ** 0.5)
            elif key.startswith(("roi_heads.mask_head", "roi_heads.keypoint_head")):
                nn.init.normal_(weight, std=0.1)  # a bias: zeros would leave a ReLU at zero where a RoI has no features
    return model.to(device, torch.float64).eval()


def pictures(device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator, dtype=torch.float64).to(device) for size in ((64, 80), (70, 66))]


def targets(device: str = "cpu") -> list[dict[str, torch.Tensor]]:
    result = []
    for picture in pictures():
        height, width = picture.shape[1:]
        boxes = torch.tensor([[4.0, 6, 30, 40], [20, 10, 60, 58], [34, 30, 50, 44]], dtype=torch.float64)
        masks = torch.zeros(3, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        spots = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2 + torch.arange(5.0)[:, None]
        found = {
            "boxes": boxes,
            "labels": torch.tensor([1, 2, 3]),
            "masks": masks,
            "keypoints": torch.cat([spots, torch.ones(3, 5, 1)], -1).float(),  # torchvision takes no other
        }
        result.append({name: value.to(device) for name, value in found.items()})
    return result


def assert_same(ours: list[dict[str, torch.Tensor]], stock: list[dict[str, torch.Tensor]]) -> None:
    """Of every picture the same detections; those of equal scores in any order."""
    for one, other in zip(ours, stock, strict=True):
        assert one.keys() == other.keys()
        assert len(one["boxes"]) == len(other["boxes"])
        apart = (one["boxes"][:, None] - other["boxes"]).abs().amax(-1) + (one["labels"][:, None] != other["labels"])
        apart += (one["scores"][:, None] - other["scores"]).abs()
        partner = []
        for row in range(len(apart)):  # the nearest that is left, for there may be equal boxes
            partner.append(int(apart[row].argmin()))
            apart[:, partner[-1]] = torch.inf
        theirs = {key: value[partner] for key, value in other.items()}
        if "keypoints" in one:  # places of maxima of heat maps, of which some are almost equal
            assert (one["keypoints"] - theirs["keypoints"]).abs().amax(-1).median() <= 1e-6
        for key in one.keys() - {"keypoints"}:
            torch.testing.assert_close(
                one[key], theirs[key], rtol=1e-6, atol=1e-6, msg=lambda text, key=key: key + text
            )
