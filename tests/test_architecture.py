"""House rules that no linter knows, checked on the source tree. Each check is also shown to fail."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 40  # lines with code: no docstring, comment or blank line

TORCH_PRIVATE_FILE = "fxfusion/graph/torch_private.py"
ALLOWED_PRIVATE_NAMES: frozenset[str] = frozenset()  # dotted names; keep it empty where possible

COMPILER = ("passes/", "fxfusion/graph/", "fxfusion/compiler/", "fxfusion/plan/", "fxfusion/backend.py")
# A name that is no other word is not allowed anywhere in a file, comments included; one that is a word
# too (phi, opt) is not allowed as a whole identifier or string, nor at the start of a class name.
FAMILIES = re.compile(
    "llama|mi[sx]tral|qwen|gemma|gpt_?2|gpt_?neo|gptj|falcon|granite|olmo|nemotron|stablelm|smollm|starcoder"
    "|deepseek|chatglm|internlm|roberta|deberta",
    re.IGNORECASE,
)
WORD_FAMILIES = re.compile(
    r"(phi|opt|glm|mpt|bert|bloom|cohere|gpt|vit|t5)\d?$"
    r"|(Phi|OPT|Glm|GLM|Mpt|MPT|Bert|Bloom|Cohere|GPT|ViT|T5)\d?[A-Z]"
)
NOT_FOR_IMPORT = ("transformers", "matplotlib", "typer", "rich", "jinja2", "hypothesis")


def source_files() -> dict[str, str]:
    """Text of each file of the package, by path relative to the root. `passes/` counts once."""
    found = [*ROOT.glob("fxfusion/**/*.py"), *ROOT.glob("passes/**/*.py")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in found)
    once = [name for name in names if not name.startswith("fxfusion/passes/")]
    return {name: (ROOT / name).read_text("utf-8") for name in once}


# --- size ---------------------------------------------------------------------------------------------


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for docstring in docstrings(ast.parse(source)):
        lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return lines


def docstrings(tree: ast.AST) -> Iterator[ast.stmt]:
    """The docstring statement of the module, of each class and of each function."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            yield node.body[0]


def long_parts(name: str, source: str) -> list[str]:
    """Files and functions above the limits."""
    problems = []
    length = len(source.splitlines())
    if length > MAX_FILE_LINES:
        problems.append(f"{name}: {length} lines, at most {MAX_FILE_LINES}")
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            count = len(lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            if count > MAX_FUNCTION_LINES:
                where = f"{name}:{node.lineno}: {node.name}"
                problems.append(f"{where} has {count} lines of code, at most {MAX_FUNCTION_LINES}")
    return problems


def test_files_and_functions_are_short() -> None:
    assert_no_problems(long_parts)


def test_a_long_function_and_a_long_file_are_found() -> None:
    doc = '    """' + "doc\n" * 50 + '    """\n    # comment\n\n'
    fits = "def f():\n" + doc + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert long_parts("a.py", fits) == []
    assert "f has 41 lines of code" in long_parts("a.py", fits + "    x = 2\n")[0]
    assert "601 lines" in long_parts("a.py", "x = 1\n" * 601)[0]


# --- private names of torch ---------------------------------------------------------------------------


def private_torch_names(name: str, source: str) -> list[str]:
    """Uses of private torch names, also through an alias, `getattr` or `import_module`."""
    if name == TORCH_PRIVATE_FILE:
        return []
    tree = ast.parse(source)
    aliases = torch_aliases(tree)
    found = {
        f"{name}:{getattr(node, 'lineno', 0)}: {dotted}"
        for node in ast.walk(tree)
        for dotted in torch_names(node, aliases)
        if is_private(dotted)
    }
    # The chain a.b.c holds a.b too: report the longest.
    longest = [one for one in sorted(found) if not any(other.startswith(one + ".") for other in found)]
    return [f"{one} is private; use {TORCH_PRIVATE_FILE}" for one in longest]


def is_private(dotted: str) -> bool:
    parts = dotted.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return parts[0] == "torch" and hidden and dotted not in ALLOWED_PRIVATE_NAMES


def torch_aliases(tree: ast.AST) -> dict[str, str]:
    """Local names that stand for torch or something inside it, with what they stand for."""
    aliases = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update({item.asname: item.name for item in node.names if item.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            aliases.update({item.asname or item.name: f"{node.module}.{item.name}" for item in node.names})
    return {local: dotted for local, dotted in aliases.items() if dotted.split(".")[0] == "torch"}


def torch_names(node: ast.AST, aliases: dict[str, str]) -> Iterator[str]:
    """Dotted names that one syntax node imports or reads."""
    if isinstance(node, ast.Import):
        yield from (item.name for item in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{item.name}" for item in node.names)
    elif isinstance(node, ast.Attribute):
        yield dotted_name(node, aliases)
    elif isinstance(node, ast.Call):
        constants = [item.value for item in node.args if isinstance(item, ast.Constant)]
        texts = [value for value in constants if isinstance(value, str)]
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in {"getattr", "hasattr", "setattr"} and texts:
            yield f"{dotted_name(node.args[0], aliases)}.{texts[0]}"
        elif called in {"import_module", "__import__"} and texts:
            yield texts[0]


def dotted_name(node: ast.AST, aliases: dict[str, str]) -> str:
    """`torch.fx.Graph` for that attribute chain, or "" where it does not start at torch."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    if isinstance(node, ast.Attribute):
        start = dotted_name(node.value, aliases)
        return f"{start}.{node.attr}" if start else ""
    return ""


def test_only_torch_private_touches_private_torch_names() -> None:
    assert_no_problems(private_torch_names)


@pytest.mark.parametrize(
    "snippet",
    [
        "import torch\ntorch._dynamo.reset()",
        "import torch._inductor.config",
        "from torch._guards import TracingContext",
        "from torch.fx import _symbolic_trace",
        "from torch import fx as f\nf._pytree.x",
        "import torch.nn.functional as F\nF._helper(1)",
        "import torch as t\nif x is t._C._nn.gelu: pass",
        "import torch\ngetattr(torch, '_dynamo')",
        "import importlib\nimportlib.import_module('torch._inductor')",
    ],
)
def test_a_private_torch_name_is_found(snippet: str) -> None:
    assert len(private_torch_names("fxfusion/backend.py", snippet)) == 1
    assert private_torch_names(TORCH_PRIVATE_FILE, snippet) == []


def test_public_torch_names_are_allowed() -> None:
    text = "import torch\nfrom torch import fx\ntorch.__version__\nfx.Graph\nnode._args\n'torch._x'"
    assert private_torch_names("a.py", text) == []


# --- no model family in the compiler ------------------------------------------------------------------


def family_names(name: str, source: str) -> list[str]:
    """Names of model families in a file of the compiler."""
    if not name.startswith(COMPILER):
        return []
    problems = [
        f"{name}:{number}: names the model family {match.group()!r}"
        for number, line in enumerate(source.splitlines(), 1)
        for match in FAMILIES.finditer(line)
    ]
    for node in ast.walk(ast.parse(source)):
        problems += [
            f"{name}:{getattr(node, 'lineno', 0)}: names the model family {word!r}"
            for word in words_of(node)
            if WORD_FAMILIES.match(word)
        ]
    return problems


def words_of(node: ast.AST) -> Iterator[str]:
    """Identifiers and strings that one syntax node holds itself."""
    for field in ("id", "attr", "name", "arg", "value"):
        word = getattr(node, field, None)
        if isinstance(word, str):
            yield word


def test_no_model_family_is_named_in_the_compiler() -> None:
    assert_no_problems(family_names)


@pytest.mark.parametrize(
    "snippet",
    ["class LlamaRule: ...", "# as in Qwen2", "x == 'opt'", "phi = 1", "m.PhiMLP", "def is_gpt_neox(): ..."],
)
def test_a_model_family_is_found(snippet: str) -> None:
    assert family_names("passes/ffn.py", snippet)
    assert family_names("fxfusion/models/layers.py", snippet) == []


def test_ordinary_words_are_no_model_family() -> None:
    words = "'opt in to coherent graphs'\noptimizer = options\nphilosophy = prompt\nOptionError\nlibertine"
    assert family_names("passes/ffn.py", words) == []


# --- pass files ---------------------------------------------------------------------------------------


def pass_file_problems(name: str, source: str, root: Path = ROOT) -> list[str]:
    """What is missing around a pass: its test file, or the source in its docstring."""
    if not name.startswith("passes/") or name.endswith("/__init__.py"):
        return []
    problems = []
    test = f"tests/passes/test_{Path(name).stem}.py"
    if not (root / test).is_file():
        problems.append(f"{name}: has no test file {test}")
    if "Source:" not in (ast.get_docstring(ast.parse(source)) or ""):
        problems.append(f"{name}: its docstring has no 'Source:'")
    return problems


def test_each_pass_has_a_test_file_and_a_source() -> None:
    assert_no_problems(pass_file_problems)


def test_a_pass_without_test_or_source_is_found(tmp_path: Path) -> None:
    assert len(pass_file_problems("passes/fold.py", '"""Fold."""', tmp_path)) == 2
    (tmp_path / "tests/passes").mkdir(parents=True)
    (tmp_path / "tests/passes/test_fold.py").touch()
    assert pass_file_problems("passes/fold.py", '"""Fold.\n\nSource: eq. 5\n"""', tmp_path) == []


# --- imports ------------------------------------------------------------------------------------------


def loaded_by(statement: str, after: str = "pass") -> set[str]:
    """Those of `NOT_FOR_IMPORT` that a statement loads in a fresh interpreter, beyond what `after` loads."""
    code = f"""if True:
        import sys
        {after}
        before = set(sys.modules)
        {statement}
        print(*(set(sys.modules) - before) & set({NOT_FOR_IMPORT}))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_the_package_and_the_backend_load_only_what_they_need() -> None:
    loaded = loaded_by("import fxfusion, fxfusion.backend", after="import torch")
    assert not loaded, f"`import fxfusion` loads {loaded}: import it in the function that uses it"


def test_a_loaded_package_is_found() -> None:
    assert loaded_by("import jinja2") == {"jinja2"}
    assert loaded_by("import jinja2", after="import jinja2") == set()


def test_the_top_level_holds_folders_and_at_most_five_files() -> None:
    assert len(list((ROOT / "fxfusion").glob("*.py"))) <= 5


def test_passes_is_one_folder_with_one_import_name() -> None:
    """The link serves tools that read the tree; where links are not supported it is a text file."""
    link = ROOT / "fxfusion/passes"
    assert link.resolve() == ROOT / "passes" or link.read_text("utf-8") == "../passes"


def assert_no_problems(check: Callable[[str, str], list[str]]) -> None:
    """Run one check over the tree and show all its findings."""
    files = source_files()
    assert len(files) > 5, "the source files were not found"
    problems = [problem for name, source in files.items() for problem in check(name, source)]
    assert not problems, "\n" + "\n".join(problems)
