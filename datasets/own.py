"""The user's own data: npz:FILE, and FILE.py:FUNCTION, which is called without arguments and returns

    x_train, y_train, x_test, y_test, classes                arrays
    x_train, y_train, x_test, y_test, classes, "flip crop"   the same, images augmented so in training
    train, test, classes                                     torch Datasets of (x, label)
"""
import math
from pathlib import Path

import numpy as np

from datasets import Source, check_arrays, moments, read_npz
from datasets.loader import Checked, seeded
from dldr import distributed, userfile
from dldr.errors import UserError


def read(name):
    """(Source, arrays as `check_arrays` has them) of npz:FILE or FILE.py:FUNCTION; or (None, what `loader.load` takes).

    Raises UserError that says what was expected and what came.
    """
    where = f"--datasets {name}"
    if name.startswith("npz:"):
        return check_own(read_npz(Path(name[4:]).expanduser(), where), None, where)
    with distributed.rank0_first(), seeded(0):  # a split is the same in all stages; weights are --randomseed's
        value, imports = userfile.call(name, "--datasets")
    value = value if isinstance(value, (tuple, list)) else (value,)
    if len(value) == 3:
        with seeded(0):  # items may draw, too
            return None, own_datasets(*value, where, imports)
    if len(value) not in (5, 6):
        kinds = ", ".join(type(item).__name__ for item in value)
        raise UserError(f"{where}: the function must return x_train, y_train, x_test, y_test, classes (and maybe an "
                        f"augmentation), or train, test, classes; it returned {len(value)} of them ({kinds})")
    return check_own(value[:4], value[4], where, *value[5:])


def own_datasets(train, test, classes, where, imports):
    """What `loader.load` takes; the first items are checked here, the others when they are read."""
    check_classes(classes, where)
    checked = []
    for name, dataset in (("training", train), ("test", test)):
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset)):
            raise UserError(f"{where}: the {name} set must be a Dataset with a length and items, not "
                            f"{type(dataset).__name__}{' of length 0' if hasattr(dataset, '__len__') else ''}")
        checked.append(Checked(dataset, f"the {name} set of {where}", classes, imports))
    checked[1].shape = checked[0][0][0].shape
    checked[1][0]
    return *checked, classes, None


def check_own(arrays, classes, where, augment=""):
    """Source and arrays of what a user's file holds; classes None: as many as y_train has."""
    try:
        arrays = [np.asarray(array) for array in arrays]
        with np.errstate(over="ignore"):  # too large for float32 is not finite
            arrays = [np.require(x, np.float32 if x.dtype.kind == "f" else x.dtype.newbyteorder("="), "CW")
                      for x in arrays]  # as torch takes them: in native order, without negative strides, writable
    except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths, tensors on a GPU, with gradients
        raise UserError(f"{where}: what should be x_train, y_train, x_test, y_test is no array: {error}") from error
    arrays = x_train, y_train, _, _ = [x[..., None] if x.dtype == np.uint8 and x.ndim == 3 else x for x in arrays]
    if classes is None:
        check_arrays(arrays, math.inf, where)
        classes = int(y_train.max()) + 1
    check_classes(classes, where)
    check_arrays(arrays, classes, where)
    images = x_train.dtype == np.uint8
    if not isinstance(augment, str) or set(augment.split()) - {"flip", "crop"} or augment and not images:
        raise UserError(f"{where}: the augmentation must be 'flip', 'crop' or 'flip crop', of uint8 images; it is "
                        f"{augment!r}, of {x_train.dtype} arrays")
    if images:
        statistics = moments(x_train[i : i + 1000] for i in range(0, len(x_train), 1000))
        return Source(classes, *statistics, None, augment), arrays
    return Source(classes, None, None, None, ""), arrays


def check_classes(classes, where):
    if not isinstance(classes, (int, np.integer)) or classes < 2:
        raise UserError(f"{where}: the number of classes must be an integer of at least 2, not {classes!r}")
