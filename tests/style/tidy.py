#!/usr/bin/env python3
"""Runs clang-tidy over every .cc of the project's folders that a build folder compiles.

Usage: tidy.py [--build=build/asan] [--jobs=N] [FILE...]
A file that passed is not looked at again until it, a header that it includes, its flags, .clang-tidy
or clang-tidy itself changes: what passed is remembered by a hash of all these in CLUSTERKV_TIDY_CACHE
(default: ~/.cache/clusterkv-tidy). Exit code 1: a finding.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("proto", "kernels", "cache_service", "worker")
# Generated, or for another compiler.
LEFT_OUT = ("/gen/",)
EMULATOR = "tests/gpu/emulator"  # stands in for CUDA's headers, names and all


def cache_folder():
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return pathlib.Path(os.environ.get("CLUSTERKV_TIDY_CACHE") or default / "clusterkv-tidy")


def commands(build, wanted):
    """The compile commands of the project's own sources, a source once."""
    found = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        path = pathlib.Path(entry["directory"], entry["file"]).resolve()
        if path.suffix != ".cc" or not path.is_relative_to(ROOT):
            continue
        name = path.relative_to(ROOT).as_posix()
        if name.split("/")[0] not in FOLDERS or any(part in f"/{name}" for part in LEFT_OUT):
            continue
        if EMULATOR in entry["command"]:
            continue
        if not wanted or name in wanted:
            found.setdefault(name, entry)
    return found


@functools.lru_cache(maxsize=None)
def file_hash(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def dependencies(entry):
    """The files that the compiler reads for this source."""
    words = shlex.split(entry["command"])
    while pathlib.Path(words[0]).name in ("ccache", "sccache"):
        words.pop(0)
    target = words.index("-o")
    words = [w for w in words[:target] + words[target + 2:] if w not in ("-c", "-MD", "-MMD")]
    made = subprocess.run(words + ["-M", "-MF", "-"], cwd=entry["directory"], check=True,
                          capture_output=True, text=True).stdout
    made = made.replace("\\\n", " ").split(": ", 1)[1]
    return sorted({os.path.join(entry["directory"], path) for path in made.split()})


def key(name, entry, version):
    digest = hashlib.sha256()
    root = str(ROOT)
    for part in (version, file_hash(ROOT / ".clang-tidy"), name,
                 entry["command"].replace(root, ".")):
        digest.update(part.encode() + b"\0")
    for path in dependencies(entry):
        digest.update(os.path.realpath(path).replace(root, ".").encode() + b"\0")
        digest.update(file_hash(path).encode() + b"\0")
    return digest.hexdigest()


def check(name, entry, build, version, cache):
    """What was found, and whether it was looked at now."""
    stamp = cache / key(name, entry, version)
    if stamp.exists():
        stamp.touch()
        return "", False
    done = subprocess.run(["clang-tidy", "--quiet", "-p", str(build), str(ROOT / name)],
                          capture_output=True, text=True, check=False)
    if done.returncode == 0:
        stamp.touch()
        return "", True
    return done.stdout + done.stderr, True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build/asan")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    version = subprocess.run(["clang-tidy", "--version"], capture_output=True, text=True,
                             check=True).stdout
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    entries = commands(options.build.resolve(), set(options.files))
    if not entries:
        sys.exit("no source to look at: is the build folder configured?")
    findings = looked_at = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(check, name, entry, options.build, version, cache): name
                   for name, entry in sorted(entries.items())}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            output, now = future.result()
            looked_at += now
            if output:
                findings += 1
                print(output, flush=True)
            verdict = "FOUND" if output else "ok" if now else "as before"
            print(f"[{done}/{len(entries)}] {futures[future]}: {verdict}", flush=True)
    print(f"{findings} of {len(entries)} files with findings, {looked_at} looked at")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
