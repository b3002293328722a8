#!/usr/bin/env python3
"""Checks what the house style says and no compiler does.

Usage: check_style.py rules|format [ROOT]
  rules   line and function lengths, header guards, words and paths that have no place here
  format  clang-format's opinion of every C++ file (skipped with exit status 77 where version 14,
          whose opinion is the one that counts, is absent)
Prints one line per finding, FILE:LINE: MESSAGE, and exits 1 if there is any.
"""

import ast
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

CPP = {".cc", ".h", ".cu", ".cuh"}
CODE = CPP | {".sh", ".proto", ".cmake"}
TEXT = CODE | {".py", ".md", ".txt", ".json", ".yaml", ".yml", ".toml"}
TOP_LEVEL_FOLDERS = {"proto", "kernels", "cache_service", "worker", "deploy", "tests"}
TOP_LEVEL_FILES = {"CMakeLists.txt", "CMakePresets.json", "README.md", "CHANGELOG.md", "LICENSE"}
NOT_OURS = {"build", "__pycache__"}  # and dot folders but .ci
MAX_COLUMNS = 100
MAX_FUNCTION_LINES = {".cu": 120, ".cuh": 120}
MAX_HOST_FUNCTION_LINES = 70
CLANG_FORMAT_VERSION = 14
SKIPPED = 77

MACHINE_PATH = re.compile(r"(?<![\w.$}~*-])/(?:work|home|Users|root)/\w")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")  # not a finding itself
THROW = re.compile(r"\bthrow\b")
VALUE = re.compile(r"\.value\(\)")
# Where a status becomes Python's exception.
MAY_THROW = "worker/python/native/"
NOT_A_FUNCTION = re.compile(r"^\s*(?:inline\s+)?(?:namespace|class|struct|union|enum)\b")
CLASS_LIKE = re.compile(r"\b(?:namespace|class|struct|union|extern)\b")


@dataclasses.dataclass(frozen=True)
class Finding:
    path: str
    line: int
    message: str

    def __str__(self):
        return f"{self.path}:{self.line}: {self.message}"


def project_files(root):
    """Paths relative to root of every file that is the project's own, sorted."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders
            if name not in NOT_OURS and (not name.startswith(".") or name == ".ci"))
        here = pathlib.Path(folder).relative_to(root)
        files += [here / name for name in names]
    return sorted(files)


def blank_comments_and_strings(text):
    """`text` with comments and literals turned to spaces; lines stay where they are."""
    pattern = re.compile(
        r'//[^\n]*|/\*.*?\*/|R"(?P<tag>[^()\s\\]*)\(.*?\)(?P=tag)"'
        r'|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def cpp_functions(code):
    """(name, first line, lines) of the body of every function; `code` without comments and strings.

    Approximate: a brace is a function's when what stands before it has a parameter list and it lies
    in nothing but namespaces and classes. Relies on clang-format's spaces. Preprocessor lines are
    left out.
    """
    code = re.sub(r"^[ \t]*#(?:[^\n\\]|\\.|\\\n)*", lambda m: re.sub(r"[^\n]", " ", m.group()),
                  code, flags=re.MULTILINE)
    scopes = []  # of each open brace: (kind, head to go on with after it, name, line)
    line, head = 1, ""
    for char in code:
        line += char == "\n"
        if char == "{":
            kind = brace_kind(head, all(scope[0] == "scope" for scope in scopes))
            name = re.search(r"([~\w:]+)\s*\(", head)
            scopes.append((kind, head if kind == "value" else "", name and name.group(1), line))
            head = ""
        elif char == "}" and scopes:
            kind, head, name, first = scopes.pop()
            if kind == "function":
                yield name, first, line - first + 1
        elif char == ";":
            head = ""
        else:
            head += char


def brace_kind(head, in_scope):
    """What a brace after `head` opens: "scope" (of names), "function", "value" or "block"."""
    if not in_scope:
        return "block"
    if head[-1:].strip() and head[-1:] != ")":
        return "value"  # b_{2}
    if "(" in head and not NOT_A_FUNCTION.match(head):
        return "function"
    return "scope" if CLASS_LIKE.search(head) else "block"


def guard_of(path):
    return "CLUSTERKV_" + re.sub(r"[^A-Za-z0-9]", "_", str(path)).upper() + "_"


def check_guard(path, text):
    guard = guard_of(path)
    code = blank_comments_and_strings(text)
    guarded = rf"^#ifndef {guard}\n#define {guard}$"
    if path.name.endswith("-inl.h"):  # Highway's, included once per target
        guarded = rf"^#if defined\({guard}\) == defined\(HWY_TARGET_TOGGLE\)$"
    if not re.search(guarded, code, re.MULTILINE):
        yield Finding(str(path), 1, f"header guard: expected {guard}")
    elif not text.rstrip().endswith(f"#endif  // {guard}"):
        yield Finding(str(path), text.count("\n"), f"expected to end with #endif  // {guard}")


def check_cpp(path, text):
    is_test = path.parts[0] == "tests"
    code = blank_comments_and_strings(text)
    for number, line in enumerate(code.split("\n"), 1):
        if THROW.search(line) and not str(path).startswith(MAY_THROW):
            yield Finding(str(path), number, "throw: errors are absl::Status here")
        if not is_test and VALUE.search(line):
            yield Finding(str(path), number, ".value() outside tests: look at the status first")
    limit = MAX_FUNCTION_LINES.get(path.suffix, MAX_HOST_FUNCTION_LINES)
    for name, line, lines in cpp_functions(code):
        if lines > limit:
            yield Finding(str(path), line, f"{name} has {lines} lines, at most {limit}")
    if path.suffix in {".h", ".cuh"}:
        yield from check_guard(path, text)


def check_python(path, text):
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_HOST_FUNCTION_LINES:
                yield Finding(str(path), node.lineno,
                              f"{node.name} has {lines} lines, at most {MAX_HOST_FUNCTION_LINES}")


def check_text(path, text):
    is_code = path.suffix in CODE or path.name == "CMakeLists.txt" or path.parts[0] == ".ci"
    for number, line in enumerate(text.split("\n"), 1):
        if is_code and len(line) > MAX_COLUMNS:
            yield Finding(str(path), number, f"{len(line)} columns, at most {MAX_COLUMNS}")
        if UNFINISHED.search(line):
            yield Finding(str(path), number, f"unfinished: {UNFINISHED.search(line).group()}")
        if MACHINE_PATH.search(line):
            yield Finding(str(path), number,
                          f"a path of one machine: {MACHINE_PATH.search(line).group()}…")


def check_top_level(root):
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(".") or entry.name in NOT_OURS:
            continue
        allowed = TOP_LEVEL_FOLDERS if entry.is_dir() else TOP_LEVEL_FILES
        if entry.name not in allowed:
            yield Finding(entry.name, 1, "the root holds only " +
                          ", ".join(sorted(TOP_LEVEL_FOLDERS | TOP_LEVEL_FILES)))


def check_file(path, text):
    yield from check_text(path, text)
    if path.suffix in CPP:
        yield from check_cpp(path, text)
    elif path.suffix == ".py":
        yield from check_python(path, text)


def check_rules(root):
    yield from check_top_level(root)
    for path in project_files(root):
        if path.suffix in TEXT or path.parts[0] == ".ci":
            yield from check_file(path, (root / path).read_text(encoding="utf-8"))


def find_clang_format():
    """The path of clang-format in the version that counts, or None."""
    for name in (f"clang-format-{CLANG_FORMAT_VERSION}", "clang-format"):
        program = shutil.which(name)
        if program is None:
            continue
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        if f"version {CLANG_FORMAT_VERSION}." in version.stdout:
            return program
    return None


def check_format(root):
    program = find_clang_format()
    if program is None:
        print(f"SKIPPED: no clang-format {CLANG_FORMAT_VERSION} here")
        sys.exit(SKIPPED)
    files = [str(path) for path in project_files(root) if path.suffix in CPP]
    run = subprocess.run([program, "--dry-run", "--ferror-limit=3", *files], cwd=root,
                         capture_output=True, text=True, check=False)
    if run.returncode != 0:
        yield Finding(".clang-format", 1, run.stderr.strip())
        return
    warning = r"^(.+?):(\d+):\d+: (?:warning|error): (.*)$"
    for match in re.finditer(warning, run.stderr, re.MULTILINE):
        yield Finding(match.group(1), int(match.group(2)), match.group(3))


def main(arguments):
    checks = {"rules": check_rules, "format": check_format}
    if len(arguments) not in (1, 2) or arguments[0] not in checks:
        print(__doc__, file=sys.stderr)
        return 2
    default_root = pathlib.Path(__file__).resolve().parents[2]
    root = pathlib.Path(arguments[1]) if len(arguments) == 2 else default_root
    findings = list(checks[arguments[0]](root))
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
