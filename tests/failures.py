#!/usr/bin/env python3
"""Prints what each failing test of a CTest run said, from its JUnit file.

Usage: tests/failures.py build/PRESET/ctest.xml
"""

import re
import sys
import xml.etree.ElementTree as ElementTree

MAX_LINES = 60
PASSED = re.compile(r"\[(?: *OK *| RUN *|-+|=+| PASSED *)\]|^\s*$")


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        cases = ElementTree.parse(sys.argv[1]).getroot().iter("testcase")
    except (OSError, ElementTree.ParseError) as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return 1
    for case in cases:
        failure = case.find("failure")
        if failure is None:
            continue
        print(f"---- {case.get('name')} after {case.get('time')} s: {failure.get('message') or ''}")
        output = case.findtext("system-out") or ""
        lines = [line for line in output.splitlines() if not PASSED.search(line)]
        print("\n".join(lines[-MAX_LINES:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
