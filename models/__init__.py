"""Networks by name: our own for 32 x 32 images, torchvision's classification models for ImageNet.

A new family is a file with a dict MODELS (name -> constructor taking num_classes), named in FAMILIES below.
"""
import difflib
import pickle

from torch import nn

import distributed
from models import (
    attention,
    densenet,
    efficientnet,
    googlenet,
    inceptionv3,
    inceptionv4,
    mobilenet,
    mobilenetv2,
    nasnet,
    preactresnet,
    resnet,
    resnet_cifar,
    resnext,
    seresnet,
    shufflenet,
    shufflenetv2,
    squeezenet,
    stochasticdepth,
    vgg,
    wideresnet,
    xception,
)
from runs import load_file, load_model, without_prefixes
from utils import InputError

FAMILIES = (
    resnet_cifar, vgg, densenet, googlenet, inceptionv3, inceptionv4, xception, resnet, preactresnet, resnext, seresnet,
    wideresnet, stochasticdepth, squeezenet, mobilenet, mobilenetv2, shufflenet, shufflenetv2, efficientnet, nasnet,
    attention,
)
SMALL = {name: constructor for family in FAMILIES for name, constructor in family.MODELS.items()}


def by_family():
    """The names for 32 x 32 images as one line of text, families apart."""
    return "; ".join(" ".join(family.MODELS) for family in FAMILIES)


def list_models(dataset="CIFAR10"):
    """Names that `get_model` knows for `dataset`."""
    if dataset != "ImageNet":
        return list(SMALL)
    import torchvision.models as tv_models

    return tv_models.list_models(module=tv_models)


def check_name(arch, dataset="CIFAR10"):
    """Raise InputError, with the closest names, unless `arch` exists for `dataset`."""
    names = list_models(dataset)
    if arch not in names:
        close = difflib.get_close_matches(arch, names, n=4, cutoff=0.4)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; there are {', '.join(names)}"
        raise InputError(f"--arch: no network {arch!r} for {dataset}{hint}")


def from_args(args, classes, device):
    """`get_model` with what the scripts' flags say, on `device`."""
    model = get_model(args.arch, classes, args.datasets, getattr(args, "pretrained", None))
    if args.sync_bn and distributed.world() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device)


def get_model(arch, num_classes, dataset="CIFAR10", pretrained=None):
    """A new network (on the CPU, drawn from torch's global generator): images -> (N, num_classes) logits.

    `pretrained` is the path of a state dict to start from, or True for torchvision's first weights, which the official
    release took (IMAGENET1K_V1; ImageNet's 1000 classes only). Raises InputError for an unknown name, or for weights
    that do not exist, fit or cannot be downloaded.
    """
    if pretrained and pretrained is not True:
        model, state = get_model(arch, num_classes, dataset), load_file(pretrained, "state dict (--pretrained)")
        load_model(model, without_prefixes(state.get("model", state)), f"--pretrained {pretrained}")
        return model
    check_name(arch, dataset)
    if dataset != "ImageNet":
        if pretrained:
            raise InputError(f"--pretrained: there are no weights for {arch} on {dataset}, only for ImageNet")
        return SMALL[arch](num_classes=num_classes)

    import torchvision.models as tv_models

    two_heads = arch in ("googlenet", "inception_v3")
    if not pretrained:
        # auxiliary heads would turn the training output into a tuple, and the method has one loss; init_weights is
        # torchvision's own default, set explicitly to silence its warning
        options = {"aux_logits": False, "init_weights": True} if two_heads else {}
        return tv_models.get_model(arch, weights=None, num_classes=num_classes, **options)
    if two_heads:
        raise InputError(f"--pretrained: the weights of {arch} want another normalisation of the images; not supported")
    if num_classes != 1000:
        raise InputError(f"--pretrained: torchvision's weights have 1000 classes, --data has {num_classes}")
    try:
        # torchvision itself would unpickle them freely, even from a cache that somebody else has written to
        with distributed.first_before_others():
            weights = tv_models.get_model_weights(arch)
            weights = getattr(weights, "IMAGENET1K_V1", weights.DEFAULT)  # a few have later ones only
            weights = weights.get_state_dict(weights_only=True, check_hash=True)
        model = tv_models.get_model(arch, weights=None)
        model.load_state_dict(weights)
        return model
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"--pretrained: the weights of {arch} could not be downloaded ({error})") from error
