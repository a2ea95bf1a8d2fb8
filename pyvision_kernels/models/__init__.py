"""Reference models in plain torch.nn layers; `pvk.convert` makes them run our kernels.

A model here imports nothing of ours, so the same object is the stock model and, converted, ours.
"""

from pyvision_kernels.models.attention import Attention
from pyvision_kernels.models.cnn import CNN
from pyvision_kernels.models.reference_vgg import ReferenceVGG
from pyvision_kernels.models.unet import UNet
from pyvision_kernels.models.vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from pyvision_kernels.models.vit import PatchClassifier, VisionTransformer, vit_b_16

__all__ = [
    "CNN",
    "VGG",
    "Attention",
    "PatchClassifier",
    "ReferenceVGG",
    "UNet",
    "VisionTransformer",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
]
