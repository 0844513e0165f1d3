"""Say in one line what keeps FastGPT from building here."""

import os
import shutil
import sys

if sys.platform != "linux" or os.uname().machine != "x86_64":
    sys.exit(f"FastGPT builds on Linux x86-64 only; this is {sys.platform} {os.uname().machine}")
if not sys.version_info[:2] >= (3, 11):
    sys.exit(
        f"Python {sys.version.split()[0]} is too old; use 3.11 or newer: make PYTHON=python3.11"
    )
cxx = os.environ.get("CXX", "g++")
if shutil.which(cxx.split()[-1]) is None:
    sys.exit(f"C++ compiler {cxx!r} not found; install g++ >= 12 or set CXX")
