"""Files: written whole or not at all, read without running code: tensors, state dicts, JSON."""
import contextlib
import io
import json
import os
import re
import warnings
import zipfile
import zlib
from collections import OrderedDict

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from dldr import distributed
from dldr.errors import UserError


def write_atomically(path, data):
    """Atomic write (temporary file, fsync, rename) of bytes, on rank 0, in a folder that is made if need be."""
    if distributed.rank():
        return path
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # of a file system whose directories cannot be flushed (CIFS)
            os.fsync(directory)  # the new name, too
        os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({len(data):,} bytes): {error.strerror or error}") from error
    return path


def save_json(path, value):
    """JSON, atomically; raises UserError with path and size if that fails."""
    return write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def load_json(path):
    """A JSON object from a file, or None if there is no such file; raises UserError if it is damaged."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def cpu_copy(value):
    """A copy of nested dicts, lists and tensors that shares no memory with the original, tensors on the CPU.

    A GPU's small tensors come in one transfer for each dtype, since each transfer is waited for.
    """
    leaves, structure = tree_flatten(value)
    groups = {}
    for i, x in enumerate(leaves):
        if isinstance(x, torch.Tensor):
            groups.setdefault((x.dtype, x.device) if x.is_cuda and x.numel() < 2**20 else i, []).append(i)
    for places in groups.values():
        tensors = [leaves[i].detach() for i in places]
        flat = torch.cat([x.reshape(-1) for x in tensors]).cpu()
        for i, x, values in zip(places, tensors, flat.split([x.numel() for x in tensors]), strict=True):
            # torch.save writes the whole storage of a view
            leaves[i] = (values.clone() if len(places) > 1 else values).view(x.shape)
    return tree_unflatten(leaves, structure)


def save_tensors(path, value):
    """torch.save of nested dicts of tensors, atomically; raises UserError like `save_json`."""
    if distributed.rank():
        return path
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError of its own wording; a file says OSError
    torch.save(cpu_copy(value), buffer)  # a copy, since it stores a view's whole storage
    return write_atomically(path, buffer.getbuffer())


def load_file(path, what, mmap=False):
    """A dict of tensors and plain values from a file; raises UserError if it is missing or unreadable.

    Only tensors and plain values are unpickled: a file from elsewhere cannot run code. torch.save's checksums, which
    torch.load ignores, are compared, so that a flipped bit is found. `mmap`: the tensors are memory-mapped.
    """
    try:
        if zipfile.is_zipfile(path):  # the official release's older format is not
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged!r} in it is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about files that are none
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no {what} at this path") from error
    except Exception as error:  # invalid files raise many exception types
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{what} {path} holds a pickled {refused[1]}; only tensors, numbers, strings, lists and "
                            "dicts are read: save its state_dict()") from error
        reason = re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__
        raise UserError(f"{what} {path} cannot be read: {reason[:200]} (truncated, or not by torch.save?)") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds a {type(value).__name__}, not a dict")
    return value


def checksum(*paths):
    """Of a file by torch.save, from the checksums that its directory carries; of the whole file in another format.

    Of several files: a checksum of their checksums; of none: None. Raises UserError if a directory is damaged.
    """
    if len(paths) != 1:
        return f"{zlib.crc32(repr([*map(checksum, paths)]).encode()):08x}" if paths else None
    path, = paths
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return f"{zlib.crc32(file.read()):08x}"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [(entry.filename, entry.CRC) for entry in archive.infolist()]
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} cannot be read: {error} (damaged?)") from error
    return f"{zlib.crc32(repr(entries).encode()):08x}"


def state_dict_in(value, keys):
    """The state dict in what people save, itself or in a dict beside other things.

    It has the names `keys` where only the prefixes of DataParallel and torch.compile differ from them, on either side.
    """
    for name in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(value.get(name), dict):
            value = value[name]
            break
    if value.keys() == set(keys):
        return value

    def bare(key):
        return re.sub(r"^((module|_orig_mod)\.)+", "", str(key))

    names = {bare(key): key for key in keys}
    found = {bare(key): item for key, item in value.items()}
    return {names[key]: item for key, item in found.items()} if found.keys() == names.keys() else found


def load_model(model, state, path):
    """model.load_state_dict of `state_dict_in`, with one line that names the file if it does not fit."""
    own = model.state_dict()
    state = OrderedDict(state_dict_in(state, list(own)))
    state._metadata = getattr(own, "_metadata", None)  # modules' versions, which files of plain dicts do not have
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not fit the network of --arch and --datasets: {error}"[:400]) from error
