"""A user's file, FILE.py:FUNCTION of --arch or --datasets: called as if it were a script of its own."""
import hashlib
import importlib.util
import inspect
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from dldr.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # with this project's datasets, models and utils


def file_of(spec, flag):
    """The file in FILE.py:FUNCTION; UserError if there is none."""
    path = Path(spec.rsplit(":", 1)[0])
    if not path.is_file():
        raise UserError(f"{flag} {spec}: there is no file {path}")
    return path


def digest(spec, flag):
    """16 hexadecimal digits that identify what is in the file (not in others that it imports)."""
    return hashlib.blake2b(file_of(spec, flag).read_bytes(), digest_size=8).hexdigest()


class Imports:
    """In here a file's imports find what a script in its folder would: modules there, installed ones, then this
    project's. Without it `from datasets import load_dataset` would find this project's datasets.
    """

    def __init__(self, file):
        folder = file.resolve().parent
        found = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
        self.path = [*([] if folder == ROOT else [str(folder)]), *found, str(ROOT)]
        ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
        specs = {name: PathFinder.find_spec(name, self.path[:-1]) for name in ours - {"dldr"}}
        self.names = {name for name, spec in specs.items() if spec and spec.loader}  # no loader: a folder of that name
        self.modules = {}  # of these names, as the file sees them

    def swap(self):
        """Exchange the modules of these names, and the path, for the others."""
        names = [name for name in sys.modules if name.partition(".")[0] in self.names]
        kept = {name: sys.modules.pop(name) for name in names}
        sys.modules.update(self.modules)
        self.modules, self.path, sys.path = kept, sys.path, self.path

    def __enter__(self):
        self.swap()

    def __exit__(self, *error):
        self.swap()


def call(spec, flag, **arguments):
    """FUNCTION(**arguments) of the file in `spec`, and the `Imports` of the file.

    Raises UserError, naming the flag, if there is no such file or function, or if it cannot be imported.
    """
    path, name = file_of(spec, flag), spec.rsplit(":", 1)[1]
    module_spec = importlib.util.spec_from_file_location(f"_file_{path.stem}", path)  # no module of ours has this name
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)  # where dataclasses look
    imports = Imports(path)
    try:
        with imports:
            module_spec.loader.exec_module(module)
            function = getattr(module, name, None)
            if not callable(function):
                raise UserError(f"{flag} {spec}: {path} has no function {name}")
            try:
                inspect.signature(function).bind(**arguments)
            except TypeError as error:
                given = ", ".join(arguments) or "no argument"
                raise UserError(f"{flag} {spec}: {name} is called with {given}: {error}") from error
            return function(**arguments), imports
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{flag} {spec}: {error}") from error
