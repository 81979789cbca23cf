#!/usr/bin/env bash
# Surprise: Llama(rpc_servers="host:port") does nothing in llama-cpp-python 0.3.9 and in 0.3.36:
# the model is loaded on this machine, without a warning. So does --rpc_servers of its server.
#
# Why a good guess is wrong: The parameter is there and has a description. llama.cpp took the
# field out of its parameters in 2025 and has devices registered instead; in 0.3.9 the value is
# set on a ctypes struct that has no such field, which ctypes permits, and in 0.3.36 Llama takes
# any keyword and the server still passes this one.
#
# Who it hurts: People who try an RPC server from Python and find that it never gets a connection;
# they look for the fault in the network or in the server.
#
# Seen with: llama-cpp-python 0.3.9 and 0.3.36 (their Python sources are read, nothing is
# compiled)
. "$(dirname "$0")/common.bash"
sources llama-cpp-python 0.3.9
sources llama-cpp-python 0.3.36
venv/bin/python - <<'PYTHON'
import ast
from pathlib import Path


def tree(version: str, file: str) -> ast.Module:
    path = Path(f"llama_cpp_python-{version}/llama_cpp/{file}")
    return ast.parse(path.read_text(encoding="utf-8"))


def find(where: ast.AST, kind: type, name: str):
    return next(n for n in ast.walk(where) if isinstance(n, kind) and n.name == name)


def fields(version: str) -> list[str]:
    """Fields of the struct that the library gets."""
    struct = find(tree(version, "llama_cpp.py"), ast.ClassDef, "llama_model_params")
    listed = next(
        n.value
        for n in struct.body
        if isinstance(n, ast.Assign) and n.targets[0].id == "_fields_"
    )
    return [item.elts[0].value for item in listed.elts]


for version in ("0.3.9", "0.3.36"):
    llama = find(tree(version, "llama.py"), ast.ClassDef, "Llama")
    init = find(llama, ast.FunctionDef, "__init__")
    named = [a.arg for a in init.args.args + init.args.kwonlyargs]
    sets = [
        ast.unparse(n)
        for n in ast.walk(init)
        if isinstance(n, ast.Assign) and ".rpc_servers" in ast.unparse(n.targets[0])
    ]
    used = "rpc_servers" in Path(f"llama_cpp_python-{version}/llama_cpp/llama.py").read_text()
    passed = "rpc_servers=settings.rpc_servers" in ast.unparse(tree(version, "server/model.py"))
    print(version)
    print("  named in Llama():", "rpc_servers" in named)
    print("  any keyword taken:", init.args.kwarg is not None, "; in llama.py at all:", used)
    print("  set:", sets)
    print("  a field of llama_model_params:", "rpc_servers" in fields(version))
    print("  passed by the server:", passed)
    assert "tensor_split" in fields(version), "the struct was not found"
    assert "rpc_servers" not in fields(version), "this has changed"
    assert passed, "this has changed"
    assert init.args.kwarg is not None, "this has changed"
PYTHON
