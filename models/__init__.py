"""Networks by name: our own for 32 x 32 images, torchvision's classification models for ImageNet.

A new family is a file with a dict MODELS (name -> constructor taking num_classes), listed in FAMILIES below.
"""
import difflib
import importlib
import pickle

import torch
from torch import nn

from dldr import distributed, userfile
from dldr.errors import UserError
from dldr.files import load_file, load_model
from dldr.subspace import trainable

FAMILIES = {  # file: its names; imported only when one of them is asked for
    "resnet_cifar": "resnet8 resnet20 resnet32 resnet44 resnet56 resnet110 resnet1202",
    "vgg": "vgg11 vgg13 vgg16 vgg19",
    "densenet": "densenet121 densenet161 densenet169 densenet201",
    "googlenet": "googlenet",
    "inceptionv3": "inceptionv3",
    "inceptionv4": "inceptionv4 inceptionresnetv2",
    "xception": "xception",
    "resnet": "resnet18 resnet34 resnet50 resnet101 resnet152",
    "preactresnet": "preactresnet18 preactresnet34 preactresnet50 preactresnet101 preactresnet152",
    "resnext": "resnext50 resnext101 resnext152",
    "seresnet": "seresnet18 seresnet34 seresnet50 seresnet101 seresnet152",
    "wideresnet": "wideresnet",
    "stochasticdepth": "stochasticdepth18 stochasticdepth34 stochasticdepth50 stochasticdepth101",
    "squeezenet": "squeezenet",
    "mobilenet": "mobilenet",
    "mobilenetv2": "mobilenetv2",
    "shufflenet": "shufflenet",
    "shufflenetv2": "shufflenetv2",
    "efficientnet": "efficientnet",
    "nasnet": "nasnet",
    "attention": "attention56 attention92",
}


def list_models(dataset="CIFAR10"):
    """Names that `get_model` knows for `dataset`."""
    if dataset != "ImageNet":
        return [name for names in FAMILIES.values() for name in names.split()]
    import torchvision.models as tv_models

    return tv_models.list_models(module=tv_models)


def check_name(arch, dataset="CIFAR10"):
    """Raise UserError, with the closest names, unless `arch` exists for `dataset` or is a FILE.py:FUNCTION."""
    if ".py:" in arch:
        return
    names = list_models(dataset)
    if arch not in names:
        close = difflib.get_close_matches(arch, names, n=4, cutoff=0.4)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; there are {', '.join(names)}"
        raise UserError(f"--arch: no network {arch!r} for {dataset}{hint}")


def construct(arch, num_classes):
    """A network of one of our own names, or of FILE.py:FUNCTION."""
    if ".py:" in arch:
        model, _ = userfile.call(arch, "--arch", num_classes=num_classes)
        if not isinstance(model, nn.Module):
            raise UserError(f"--arch {arch}: the function returned a {type(model).__name__}, not a torch.nn.Module")
        model.unused_parameters = True  # not known, so DistributedDataParallel looks for them
        return model
    family = next(family for family, names in FAMILIES.items() if arch in names.split())
    return importlib.import_module(f"models.{family}").MODELS[arch](num_classes=num_classes)


def check_output(model, arch, num_classes, x):
    """Raise UserError unless `model` takes a mini-batch like x and returns a logit per class; changes nothing."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            out = torch.func.functional_call(model.train(), buffers, x)
    except Exception as error:  # in the user's code, or of any type in a layer
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"--arch {arch} does not take a mini-batch {tuple(x.shape)} {x.dtype} of --datasets: {reason}"
                        ) from error
    found = f"{tuple(out.shape)} logits" if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
    if found != f"({len(x)}, {num_classes}) logits":
        raise UserError(f"--arch {arch}: for {len(x)} samples and {num_classes} classes the network returned {found}")
    kinds = {str(p.dtype) for p in trainable(model)}
    if kinds != {"torch.float32"}:
        raise UserError(f"--arch {arch}: the trainable parameters are {' and '.join(sorted(kinds)) or 'none'}; the "
                        "scripts train float32 ones, with --half in bfloat16 passes")


def on_device(model, device, sync_bn=False):
    """`model` on `device`, its batch norm synchronised over the ranks if so wanted."""
    if sync_bn and distributed.world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device)


def get_model(arch, num_classes, dataset="CIFAR10", pretrained=None):
    """A new network (on the CPU, drawn from torch's global generator): images -> (N, num_classes) logits.

    `pretrained` is the path of a state dict to start from, or True for torchvision's first weights, which the official
    release took (IMAGENET1K_V1; ImageNet's 1000 classes only). Raises UserError for an unknown name, or for weights
    that do not exist, fit or cannot be downloaded.
    """
    if pretrained and pretrained is not True:
        model, state = get_model(arch, num_classes, dataset), load_file(pretrained, "state dict (--pretrained)")
        load_model(model, state, f"--pretrained {pretrained}")
        return model
    check_name(arch, dataset)
    if dataset != "ImageNet" or ".py:" in arch:
        if pretrained:
            raise UserError(f"--pretrained: there are no weights for {arch} on {dataset}, only for ImageNet")
        return construct(arch, num_classes)

    import torchvision.models as tv_models

    two_heads = arch in ("googlenet", "inception_v3")
    if not pretrained:
        # auxiliary heads would turn the training output into a tuple, and the method has one loss; init_weights is
        # torchvision's own default, set explicitly to silence its warning
        options = {"aux_logits": False, "init_weights": True} if two_heads else {}
        return tv_models.get_model(arch, weights=None, num_classes=num_classes, **options)
    if two_heads:
        raise UserError(f"--pretrained: the weights of {arch} want another normalisation of the images; not supported")
    if num_classes != 1000:
        raise UserError(f"--pretrained: torchvision's weights have 1000 classes, --data has {num_classes}")
    try:
        # torchvision itself would unpickle them freely, even from a cache that somebody else has written to
        with distributed.rank0_first():
            weights = tv_models.get_model_weights(arch)
            weights = getattr(weights, "IMAGENET1K_V1", weights.DEFAULT)  # a few have later ones only
            weights = weights.get_state_dict(weights_only=True, check_hash=True)
        model = tv_models.get_model(arch, weights=None)
        model.load_state_dict(weights)
        return model
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"--pretrained: the weights of {arch} could not be downloaded ({error})") from error
