"""No input file can run code: no pickle, no eval, no loader that allows them.

Messages between the program's own processes go through `multiprocessing`, which pickles; no file comes near that.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("vaflow", "extract", "train")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}
HARMLESS = {("pickle", "UnpicklingError")}  # an exception's class
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"os.system", "os.popen", "torch.jit.load", "torch.hub.load", "importlib.import_module", "runpy.run_path"}


def sources() -> list[Path]:
    files = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return sorted(path for path in files if path.is_relative_to(ROOT))


def dotted(node: ast.AST) -> str:
    """Dotted name of an expression such as `a.b.c`, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else f"?.{node.attr}"
    return ""


def option(call: ast.Call, name: str) -> object:
    """Literal value of a keyword argument; None if it is missing or not a literal."""
    for keyword in call.keywords:
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return keyword.value.value
    return None


def offences(tree: ast.AST) -> Iterator[str]:
    """Calls in a module that could run code from a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            wrong = [name.name for name in node.names if (node.module, name.name) not in HARMLESS]
            yield from (f"from {node.module} import {name}" for name in wrong)
        elif isinstance(node, ast.Call):
            yield from _call_offences(node)


def _names_this_package(call: ast.Call) -> bool:
    """Whether a module is imported whose name begins with a literal "vaflow."."""
    argument = call.args[0] if call.args else None
    first = argument.values[0] if isinstance(argument, ast.JoinedStr) and argument.values else argument
    return isinstance(first, ast.Constant) and str(first.value).startswith("vaflow.")


def _call_offences(call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    if name == "importlib.import_module" and _names_this_package(call):
        return
    if name in CALLS or name in METHODS or name.startswith("subprocess."):
        yield f"{name}()"
    elif name == "torch.load" and option(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    elif name in ("np.load", "numpy.load") and option(call, "allow_pickle") is not False:
        yield "np.load without allow_pickle=False"
    elif name.endswith(".from_pretrained") and not (call.args and isinstance(call.args[0], ast.Constant)):
        yield f"{name} of a name or a folder, whose files choose what is imported"
    if option(call, "trust_remote_code") or option(call, "allow_pickle") or option(call, "shell"):
        yield f"{name} with an option that runs code"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_executes_file_contents(path: Path) -> None:
    assert not list(offences(ast.parse(path.read_text("utf-8"))))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import yaml as y",
        "from pickle import loads",
        "from joblib import load",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.lib.format.read_array(file, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "ASTModel.from_pretrained(path)",
        "subprocess.run(command, shell=True)",
        "torch.hub.load(repository, model)",
        "os.system(command)",
        "importlib.import_module(name)",
        "importlib.import_module('os')",
        "importlib.import_module(f'{name}.vaflow')",
    ],
)
def test_unsafe_code_is_detected(text: str) -> None:
    assert list(offences(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(p, weights_only=True)",
        "M.from_pretrained(None, config=c, state_dict=s)",
        "np.load(p, allow_pickle=False)",
        "model.eval()",
        "re.compile(x)",
        "importlib.import_module('vaflow.api')",
        "importlib.import_module(f'vaflow.{name}')",
    ],
)
def test_safe_code_is_accepted(text: str) -> None:
    assert not list(offences(ast.parse(text)))


def test_the_linter_rules_include_pickle() -> None:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["select"]
    assert {"S301", "S302", "S506"} <= set(rules)


def test_a_pickled_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """Detection by the file system: the pickle would create a directory."""
    import os
    import pickle

    from vaflow.encoders.weights import read_state_dict
    from vaflow.errors import VaflowError
    from vaflow.files import read_tensors

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    data = pickle.dumps({"state_dict": Bomb()})
    for name, read in (("a.pt", read_state_dict), ("a.safetensors", read_state_dict), ("b.safetensors", read_tensors)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VaflowError):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()
