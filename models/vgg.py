"""The VGGs of Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition"
(arXiv 1409.1556), configurations A, B, D and E, with batch normalisation.

What differs from the ImageNet VGGs: five poolings turn 32 x 32 images into one pixel, so the first linear layer sees
512 features instead of 7 x 7 x 512. As in torchvision, whose convolutions these are, each convolution keeps its bias in
front of the batch norm, a peculiarity of the official release too.

Parameters for 10 / 100 classes: vgg11 28,149,514 / 28,518,244; vgg13 28,334,410 / 28,703,140; vgg16 33,646,666 /
34,015,396; vgg19 38,958,922 / 39,327,652.
"""
from functools import partial

from torch import nn
from torchvision.models.vgg import cfgs, make_layers


def vgg(configuration, num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits; `configuration` is a letter of the paper's table 1."""
    return nn.Sequential(
        make_layers(cfgs[configuration], batch_norm=True),
        nn.Flatten(),
        nn.Linear(512, 4096), nn.ReLU(), nn.Dropout(),
        nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(),
        nn.Linear(4096, num_classes),
    )


MODELS = {
    "vgg11": partial(vgg, "A"),
    "vgg13": partial(vgg, "B"),
    "vgg16": partial(vgg, "D"),
    "vgg19": partial(vgg, "E"),
}
